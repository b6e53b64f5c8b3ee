// Decode with AMX: scores as K * Q^T with rows of keys read from the cache as they lie, outputs as W * V with pairs of
// values interleaved on the way. Query heads fill only part of a tile, yet the products take less time than with
// vectors, and no more for 16 heads to a KV head than for one.
//
//   dots[16 keys][16 heads]          = keys[16][32 elements]   * queries[16 pairs of elements][16 heads][2]
//   sums[heads][16 elements]        += weights[heads][32 keys] * values[16 pairs of keys][16 elements][2]
//
// Interleaving works on quarters of a vector, so the 16 elements of the even tile of a pair are the first four of each
// eight of 32, and those of the odd tile the last four; write_out puts them right.
#pragma once

#include "attention_decode.h"
#include "attention_tile.h"

#if defined(QUIRE_HAS_AMX)

namespace quire {

class DecodeTiles {
  public:
    static size_t size_bytes(const AttentionArguments& a) {
        const int64_t lanes = ceil_div(a.group_size(), kLanes) * kLanes, dim = DecodeState::padded_dim(a);
        return Arena::size_of<bf16>(lanes * dim) + Arena::size_of<bf16>(lanes * kDecodeTile) +
               Arena::size_of<bf16>(kDecodeTile * dim) + Arena::size_of<bf16>(kLanes * dim) +
               Arena::size_of<float>(lanes * kDecodeTile) + Arena::size_of<float>(lanes * dim) +
               Arena::size_of<bf16>(dim);
    }

    DecodeTiles(const AttentionArguments& a, const bf16* query, const DecodeState& s, Arena& arena)
        : num_groups_(ceil_div(s.group_size, kLanes)), dim_(DecodeState::padded_dim(a)) {
        queries_ = arena.take<bf16>(num_groups_ * kLanes * dim_);
        weights_ = arena.take<bf16>(num_groups_ * kLanes * kDecodeTile);
        values_ = arena.take<bf16>(kDecodeTile * dim_);
        keys_ = arena.take<bf16>(kLanes * dim_);
        dots_ = arena.take<float>(num_groups_ * kLanes * kDecodeTile);
        zeros_ = arena.take<bf16>(dim_);
        std::memset(zeros_, 0, static_cast<size_t>(dim_) * sizeof(bf16));
        sums_ = arena.take<float>(num_groups_ * kLanes * dim_);
        std::memset(sums_, 0, static_cast<size_t>(num_groups_ * kLanes * dim_) * sizeof(float));
        std::memset(weights_, 0, static_cast<size_t>(num_groups_ * kLanes * kDecodeTile) * sizeof(bf16));
        for (int64_t group = 0; group < num_groups_; ++group) {
            const bf16* rows[kLanes];
            for (int64_t lane = 0; lane < kLanes; ++lane) {
                rows[lane] = query + std::min(group * kLanes + lane, s.group_size - 1) * a.query_stride_head;
            }
            pack_queries(rows, s.head_dim, dim_, queries_ + group * kLanes * dim_);
        }
        configure(std::min<int64_t>(s.group_size, kLanes));
    }
    DecodeTiles(const DecodeTiles&) = delete;
    DecodeTiles& operator=(const DecodeTiles&) = delete;
    ~DecodeTiles() { _tile_release(); }

    // Where the weights of head `g` go; those past the tile's keys are made zero.
    bf16* weights_of(int64_t g, const DecodeState& s) {
        bf16* weights = weights_ + g * kDecodeTile;
        const int64_t end = ceil_div(s.count, 32) * 32;
        std::memset(weights + end - 16, 0, 16 * sizeof(bf16));
        return weights;
    }

    // Fills s.scores for the tile whose first key has position `begin`; prefetches its values meanwhile.
    void score(const AttentionArguments& a, int64_t first_head, int64_t begin, int64_t position, DecodeState& s) {
        multiply_keys(a, begin, s);
        const ScoreRule rule(a);
        for (int64_t g = 0; g < s.group_size; g += 4) {
            for (int64_t t = 0; t < s.count; t += kLanes) {
                Vec columns[4];
                load_columns(dots_ + g / kLanes * kLanes * kDecodeTile + t * kLanes + g % kLanes, columns);
                const int64_t distance = begin + t - position;
                for (int64_t i = 0; i < std::min<int64_t>(4, s.group_size - g); ++i) {
                    const int64_t head = g + i;
                    const Vec scores = finish_scores(a, rule, columns[i], first_head + head, distance, s.count - t);
                    vec_store(s.scores + head * kDecodeTile + t, scores);
                }
            }
        }
    }

    // Adds the tile's weighted values to every head's sums; prefetches the next tile's keys meanwhile.
    void add_values(const AttentionArguments& a, const DecodeState& s) {
        // Well before the sums are loaded as tiles, which cannot be forwarded from stores under way.
        for (int64_t g = 0; g < s.group_size; ++g) {
            const Vec factor = vec_set(s.rescale[g]);
            float* sums = sums_ + g / kLanes * dim_ * kLanes + g % kLanes * kLanes;
            for (int64_t d = 0; d < dim_; d += 16) vec_store(sums + d * 16, vec_load(sums + d * 16) * factor);
        }
        interleave_values(a, s);
        const int64_t depth = ceil_div(s.count, 32) * 32;
        for (int64_t group = 0; group < num_groups_; ++group) {
            const bf16* weights = weights_ + group * kLanes * kDecodeTile;
            for (int64_t d = 0; d < dim_; d += 32) {
                float* sums = sums_ + (group * dim_ + d) * kLanes;
                _tile_loadd(5, sums, 64);
                _tile_loadd(6, sums + 256, 64);
                for (int64_t t = 0; t < depth; t += 32) {
                    const bf16* values = values_ + t * dim_ + d * 32;
                    _tile_loadd(4, weights + t, kDecodeTile * sizeof(bf16));
                    _tile_loadd(3, values, 64);
                    _tile_dpbf16ps(5, 4, 3);
                    _tile_loadd(2, values + 512, 64);
                    _tile_dpbf16ps(6, 4, 2);
                }
                _tile_stored(5, sums, 64);
                _tile_stored(6, sums + 256, 64);
            }
        }
    }

    // Puts the sums into s.out in the order of elements.
    void write_out(DecodeState& s) const {
        for (int64_t g = 0; g < s.group_size; ++g) {
            const float* sums = sums_ + g / kLanes * dim_ * kLanes + g % kLanes * 16;
            for (int64_t d = 0; d < dim_; d += 4) {
                const float* tile = sums + d / 32 * 512 + d / 4 % 2 * 256;
                std::memcpy(s.out + g * s.out_stride + d, tile + d % 32 / 8 * 4, 4 * sizeof(float));
            }
        }
    }

  private:
    static constexpr int64_t kLanes = 16;

    int64_t num_groups_, dim_;
    bf16* queries_;  // [group][dim / 2][16][2]
    bf16* weights_;  // [group][16][kDecodeTile]
    bf16* values_;   // [tile / 32][dim / 16][16][16][2]
    bf16* keys_;     // [16][dim], where the cache cannot be read as it lies
    float* dots_;    // [group][kDecodeTile][16 heads]
    float* sums_;    // [group][dim / 16][16][16]
    bf16* zeros_;    // [dim]

    // Tiles 0 to 3 are whole; 4 (weights), 5 and 6 (sums) have a row per head.
    static void configure(int64_t heads) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16};
        } config;
        config.rows[4] = config.rows[5] = config.rows[6] = static_cast<uint8_t>(heads);
        _tile_loadconfig(&config);
    }

    // Fills dots_ for the tile. Keys are read from the cache where 16 of them lie at one stride.
    void multiply_keys(const AttentionArguments& a, int64_t begin, const DecodeState& s) {
        const bf16* cache = static_cast<const bf16*>(a.key_cache);
        const bf16* values = static_cast<const bf16*>(a.value_cache);
        const bool is_direct = a.block_size % kLanes == 0 && begin % kLanes == 0 && s.head_dim == dim_;
        for (int64_t t = 0; t < s.count; t += kLanes) {
            for (int64_t i = t; i < std::min(s.count, t + kLanes); ++i) prefetch_row(values + s.offsets[i], s.head_dim);
            const bf16* keys = is_direct ? cache + s.offsets[t] : keys_;
            const int64_t stride = (is_direct ? a.cache_stride_slot : dim_) * static_cast<int64_t>(sizeof(bf16));
            for (int64_t i = 0; !is_direct && i < kLanes; ++i) {
                copy_row(cache + s.offsets[t + i], s.head_dim, dim_, keys_ + i * dim_);
            }
            for (int64_t group = 0; group < num_groups_; ++group) {
                const bf16* queries = queries_ + group * kLanes * dim_;
                _tile_zero(0);
                for (int64_t d = 0; d < dim_; d += 32) {
                    _tile_loadd(1, keys + d, stride);
                    _tile_loadd(2, queries + d * kLanes, 64);
                    _tile_dpbf16ps(0, 1, 2);
                }
                _tile_stored(0, dots_ + (group * kDecodeTile + t) * kLanes, 64);
            }
        }
    }

    // Four columns of 16 rows of dots, each as a vector of 16 keys.
    static void load_columns(const float* dots, Vec* columns) {
        __m512 quads[4];  // quads[i] holds rows i, i + 4, i + 8 and i + 12, four columns each
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const float* source = dots + i * kLanes;
            quads[i] = _mm512_castps128_ps512(_mm_load_ps(source));
            quads[i] = _mm512_mask_broadcast_f32x4(quads[i], 0x00f0, _mm_load_ps(source + 4 * kLanes));
            quads[i] = _mm512_mask_broadcast_f32x4(quads[i], 0x0f00, _mm_load_ps(source + 8 * kLanes));
            quads[i] = _mm512_mask_broadcast_f32x4(quads[i], 0xf000, _mm_load_ps(source + 12 * kLanes));
        }
        const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(quads[0], quads[1]));
        const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(quads[2], quads[3]));
        const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(quads[0], quads[1]));
        const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(quads[2], quads[3]));
        columns[0].v = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
        columns[1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
        columns[2].v = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
        columns[3].v = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
    }

    // Pairs of values side by side; past the tile's keys zeros, since nothing may be multiplied with what lies there.
    void interleave_values(const AttentionArguments& a, const DecodeState& s) {
        const bf16* cache = static_cast<const bf16*>(a.value_cache);
        const bf16* next_keys = static_cast<const bf16*>(a.key_cache);
        const int64_t whole = s.head_dim / 32 * 32;
        const __mmask32 rest = static_cast<__mmask32>((1u << (s.head_dim - whole)) - 1u);
        for (int64_t t = 0; t < ceil_div(s.count, 32) * 32; t += 2) {
            for (int64_t i = t; i < std::min(t + 2, s.next_count); ++i) {
                prefetch_row(next_keys + s.next_offsets[i], s.head_dim);
            }
            const bf16* even = t < s.count ? cache + s.offsets[t] : zeros_;
            const bf16* odd = t + 1 < s.count ? cache + s.offsets[t + 1] : zeros_;
            bf16* target = values_ + t / 32 * 32 * dim_ + t % 32 / 2 * 32;
            for (int64_t d = 0; d < whole; d += 32, target += 1024) {
                store_pairs(_mm512_loadu_si512(even + d), _mm512_loadu_si512(odd + d), target);
            }
            if (rest == 0) continue;
            const __m512i even_rest = _mm512_maskz_loadu_epi16(rest, even + whole);
            store_pairs(even_rest, _mm512_maskz_loadu_epi16(rest, odd + whole), target);
        }
    }

    QUIRE_INLINE static void store_pairs(__m512i even, __m512i odd, bf16* target) {
        _mm512_store_si512(target, _mm512_unpacklo_epi16(even, odd));
        _mm512_store_si512(target + 512, _mm512_unpackhi_epi16(even, odd));
    }
};

}  // namespace quire

#endif
