// One query token against its keys: all query heads of one KV head together, so keys and values are read once.
//
// Vector lanes are elements of a head. Scores: kVecWidth keys at a time, one accumulator each, whose lanes are then summed by
// a tree of shuffles into one vector of scores. Outputs: up to kHeadsAtOnce heads x four vectors of accumulators over a tile
// of values. The next stretch of keys or values is prefetched meanwhile, since blocks lie scattered in memory.
#include "attention.h"

#include <algorithm>

namespace quire {
namespace {

constexpr int64_t kTile = 128;       // most keys per step of the online softmax
constexpr int64_t kTileBytes = 16384;  // of keys, and as much again of values: both are prefetched into the first-level cache
#if defined(QUIRE_HAS_AVX512)
constexpr int kHeadsAtOnce = 6;
constexpr int kVecsAtOnce = 4;
#else
constexpr int kHeadsAtOnce = 4;
constexpr int kVecsAtOnce = 2;
#endif

struct State {
    int64_t group_size, head_dim, padded_dim, tile;
    float *scores, *out;             // [group_size][kTile], [group_size][padded_dim]
    float *maxima, *sums, *rescale;  // [group_size]
    int64_t *offsets, *next_offsets;
};

State reserve_state(const AttentionArguments& a, int64_t item_size, Arena& arena) {
    State s{};
    s.group_size = a.group_size();
    s.head_dim = a.head_dim;
    s.padded_dim = ceil_div(a.head_dim, kVecWidth) * kVecWidth;
    s.tile = std::clamp<int64_t>(kTileBytes / (a.head_dim * item_size) / kVecWidth * kVecWidth, kVecWidth, kTile);
    arena.reserve(Arena::size_of<float>(s.group_size * kTile) + Arena::size_of<float>(s.group_size * s.padded_dim) +
                  3 * Arena::size_of<float>(s.group_size) + 2 * Arena::size_of<int64_t>(kTile));
    s.scores = arena.take<float>(s.group_size * kTile);
    s.out = arena.take<float>(s.group_size * s.padded_dim);
    s.maxima = arena.take<float>(s.group_size);
    s.sums = arena.take<float>(s.group_size);
    s.rescale = arena.take<float>(s.group_size);
    s.offsets = arena.take<int64_t>(kTile);
    s.next_offsets = arena.take<int64_t>(kTile);
    std::fill_n(s.out, s.group_size * s.padded_dim, 0.0f);
    std::fill_n(s.maxima, s.group_size, kHidden);
    std::fill_n(s.sums, s.group_size, 0.0f);
    return s;
}

#if defined(QUIRE_HAS_AVX512)

// Lane i of the result is the sum of the lanes of rows[i].
QUIRE_INLINE Vec sum_rows(const Vec* rows) {
    __m512 eighth[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const auto halve = [&](int first) {
            const __m512 x = rows[first].v, y = rows[first + 4].v;
            return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
        };
        const __m512 low = halve(i), high = halve(i + 8);
        eighth[i] = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
    }
    const auto interleave = [](__m512 x, __m512 y) {
        return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y)));
    };
    const __m512d x = interleave(eighth[0], eighth[1]), y = interleave(eighth[2], eighth[3]);
    return {_mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)))};
}

// Scores kVecWidth keys against one query.
QUIRE_INLINE Vec dot_keys(const bf16* query, const bf16* cache, const int64_t* offsets, int64_t head_dim) {
    Vec sums[kVecWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kVecWidth; ++i) sums[i] = vec_zero();
    int64_t d = 0;
    for (; d + 32 <= head_dim; d += 32) {
        const __m512bh q = (__m512bh)_mm512_loadu_si512(query + d);
#pragma GCC unroll 16
        for (int i = 0; i < kVecWidth; ++i) {
            const __m512bh k = (__m512bh)_mm512_loadu_si512(cache + offsets[i] + d);
            sums[i].v = _mm512_dpbf16_ps(sums[i].v, q, k);
        }
    }
    if (d < head_dim) {
        const __mmask32 rest = static_cast<__mmask32>((1u << (head_dim - d)) - 1u);
        const __m512bh q = (__m512bh)_mm512_maskz_loadu_epi16(rest, query + d);
#pragma GCC unroll 16
        for (int i = 0; i < kVecWidth; ++i) {
            const __m512bh k = (__m512bh)_mm512_maskz_loadu_epi16(rest, cache + offsets[i] + d);
            sums[i].v = _mm512_dpbf16_ps(sums[i].v, q, k);
        }
    }
    return sum_rows(sums);
}

#else

QUIRE_INLINE Vec sum_rows(const Vec* rows) {
    __m256 quarter[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m256 x = rows[i].v, y = rows[i + 4].v;
        quarter[i] = _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
    }
    const auto interleave = [](__m256 x, __m256 y) {
        return _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y)));
    };
    const __m256d x = interleave(quarter[0], quarter[1]), y = interleave(quarter[2], quarter[3]);
    return {_mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)))};
}

#endif

// Scores kVecWidth keys against one query; in AVX-512, bfloat16 has the overload above.
template <typename T>
QUIRE_INLINE Vec dot_keys(const T* query, const T* cache, const int64_t* offsets, int64_t head_dim) {
    Vec sums[kVecWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kVecWidth; ++i) sums[i] = vec_zero();
    int64_t d = 0;
    for (; d + kVecWidth <= head_dim; d += kVecWidth) {
        const Vec q = vec_load(query + d);
#pragma GCC unroll 16
        for (int i = 0; i < kVecWidth; ++i) sums[i] = vec_fma(q, vec_load(cache + offsets[i] + d), sums[i]);
    }
    if (d < head_dim) {
        const int64_t rest = head_dim - d;
        const Vec q = vec_load(query + d, rest);
#pragma GCC unroll 16
        for (int i = 0; i < kVecWidth; ++i) sums[i] = vec_fma(q, vec_load(cache + offsets[i] + d, rest), sums[i]);
    }
    return sum_rows(sums);
}

template <typename T>
QUIRE_INLINE void prefetch_row(const T* row, int64_t head_dim) {
    const char* begin = reinterpret_cast<const char*>(row);
    for (int64_t i = 0; i < head_dim * static_cast<int64_t>(sizeof(T)); i += 64) _mm_prefetch(begin + i, _MM_HINT_T0);
}

// Fills s.scores for the `count` keys at s.offsets, which is padded to whole vectors with repeats of the last key.
template <typename T>
void score_tile(const AttentionArguments& a, const T* query, int64_t first_head, int64_t distance, int64_t count, State& s) {
    const ScoreRule rule(a);
    const T* keys = static_cast<const T*>(a.key_cache);
    const T* values = static_cast<const T*>(a.value_cache);
    alignas(64) float lane[kVecWidth];
    for (int i = 0; i < kVecWidth; ++i) lane[i] = static_cast<float>(i);
    for (int64_t t = 0; t < count; t += kVecWidth) {
        for (int64_t i = t; i < std::min(count, t + kVecWidth); ++i) prefetch_row(values + s.offsets[i], s.head_dim);
        const Vec distances = vec_load(lane) + vec_set(static_cast<float>(distance + t));
        for (int64_t g = 0; g < s.group_size; ++g) {
            const T* q = query + g * a.query_stride_head;
            Vec score = rule.apply(dot_keys(q, keys, s.offsets + t, s.head_dim));
            if (a.alibi_slopes != nullptr) {
                score = vec_fma(vec_set(a.alibi_slopes[first_head + g] * kLog2E), distances, score);
            }
            if (t + kVecWidth > count) score = vec_keep(score, count - t, vec_set(-kInfinity));
            vec_store(s.scores + g * kTile + t, score);
        }
    }
}

// Turns the scores of one head into weights, and updates its maximum, sum and the factor for its output so far.
void update_softmax(int64_t g, int64_t count, State& s) {
    float* scores = s.scores + g * kTile;
    Vec highest = vec_load(scores);
    for (int64_t t = kVecWidth; t < count; t += kVecWidth) highest = vec_max(highest, vec_load(scores + t));
    const float maximum = std::max(s.maxima[g], reduce_max(highest));
    Vec sum = vec_zero();
    for (int64_t t = 0; t < count; t += kVecWidth) {
        const Vec weight = vec_exp2(vec_load(scores + t) - vec_set(maximum));
        vec_store(scores + t, weight);
        sum = sum + weight;
    }
    s.rescale[g] = __builtin_exp2f(s.maxima[g] - maximum);
    s.sums[g] = s.sums[g] * s.rescale[g] + reduce_add(sum);
    s.maxima[g] = maximum;
}

template <typename T> static thread_local const T* s_next_keys = nullptr;
// out[g] = out[g] * rescale + weights * values, for kHeads heads from `g` and kVecs vectors from element `d`; the last
// vector has `last_count` elements.
template <typename T, int kHeads, int kVecs>
void add_values(const T* values, int64_t g, int64_t d, int64_t last_count, int64_t count, State& s) {
    const T* pk = (g==0 && d==0) ? s_next_keys<T> : nullptr;
    Vec sums[kHeads][kVecs];
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
            sums[h][v] = vec_load(s.out + (g + h) * s.padded_dim + d + v * kVecWidth) * vec_set(s.rescale[g + h]);
        }
    }
    const float* weights = s.scores + g * kTile;
    const auto add = [&](int64_t t, const Vec* row) {
#pragma GCC unroll 8
        for (int h = 0; h < kHeads; ++h) {
            const Vec weight = vec_set(weights[h * kTile + t]);
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) sums[h][v] = vec_fma(weight, row[v], sums[h][v]);
        }
    };
    for (int64_t t = 0; t < count; ++t) {
        const T* source = values + s.offsets[t] + d;
        if (pk) prefetch_row(pk + s.next_offsets[t], s.head_dim);
        Vec row[kVecs];
#pragma GCC unroll 4
        for (int v = 0; v < kVecs - 1; ++v) row[v] = vec_load(source + v * kVecWidth);
        const T* last = source + (kVecs - 1) * kVecWidth;
        row[kVecs - 1] = last_count == kVecWidth ? vec_load(last) : vec_load(last, last_count);
        add(t, row);
    }
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) vec_store(s.out + (g + h) * s.padded_dim + d + v * kVecWidth, sums[h][v]);
    }
}

template <typename T, int kVecs>
void add_values_for_heads(const T* values, int64_t d, int64_t last_count, int64_t count, State& s) {
    for (int64_t g = 0; g < s.group_size;) {
        const int64_t left = s.group_size - g;
        const int64_t heads = left > kHeadsAtOnce && left < 2 * kHeadsAtOnce ? (left + 1) / 2 : left;
        switch (std::min<int64_t>(heads, kHeadsAtOnce)) {
            case 1: add_values<T, 1, kVecs>(values, g, d, last_count, count, s), g += 1; break;
            case 2: add_values<T, 2, kVecs>(values, g, d, last_count, count, s), g += 2; break;
            case 3: add_values<T, 3, kVecs>(values, g, d, last_count, count, s), g += 3; break;
            case 4: add_values<T, 4, kVecs>(values, g, d, last_count, count, s), g += 4; break;
#if defined(QUIRE_HAS_AVX512)
            case 5: add_values<T, 5, kVecs>(values, g, d, last_count, count, s), g += 5; break;
            default: add_values<T, 6, kVecs>(values, g, d, last_count, count, s), g += 6; break;
#endif
        }
    }
}

template <typename T>
void add_value_tile(const T* values, int64_t count, State& s) {
    for (int64_t d = 0; d < s.head_dim; d += kVecsAtOnce * kVecWidth) {
        const int64_t elements = std::min<int64_t>(s.head_dim - d, kVecsAtOnce * kVecWidth);
        const int64_t vecs = ceil_div(elements, kVecWidth), last_count = elements - (vecs - 1) * kVecWidth;
        switch (vecs) {
            case 1: add_values_for_heads<T, 1>(values, d, last_count, count, s); break;
            case 2: add_values_for_heads<T, 2>(values, d, last_count, count, s); break;
#if defined(QUIRE_HAS_AVX512)
            case 3: add_values_for_heads<T, 3>(values, d, last_count, count, s); break;
            default: add_values_for_heads<T, 4>(values, d, last_count, count, s); break;
#endif
        }
    }
}

template <typename T>
void write_result(const AttentionArguments& a, const Unit& unit, int64_t first_head, float* partials, const State& s) {
    const int64_t token = a.query_start_loc[unit.seq];
    for (int64_t g = 0; g < s.group_size; ++g) {
        const float* source = s.out + g * s.padded_dim;
        if (unit.partial_row >= 0) {
            float* target = partials + (unit.partial_row + first_head + g) * partial_stride(a);
            std::copy_n(source, s.head_dim, target);
            target[s.head_dim] = s.maxima[g];
            target[s.head_dim + 1] = s.sums[g];
            continue;
        }
        T* target = static_cast<T*>(a.out) + (token * a.num_heads + first_head + g) * s.head_dim;
        const Vec inverse = vec_set(1.0f / s.sums[g]);
        for (int64_t d = 0; d < s.head_dim; d += kVecWidth) {
            const int64_t count = std::min<int64_t>(kVecWidth, s.head_dim - d);
            vec_store(target + d, vec_load(source + d) * inverse, count);
        }
    }
}

// The offsets of a tile, padded to whole vectors.
void write_tile_offsets(const AttentionArguments& a, const Unit& unit, int64_t kv_head, int64_t begin, int64_t tile,
                        int64_t* offsets) {
    const int64_t count = std::min(tile, unit.kv_end - begin);
    if (count <= 0) return;
    write_offsets(a, unit.seq, kv_head, begin, begin + count, offsets);
    std::fill(offsets + count, offsets + ceil_div(count, kVecWidth) * kVecWidth, offsets[count - 1]);
}

}  // namespace

template <typename T>
void attend_decode(const AttentionArguments& a, const Unit& unit, int64_t kv_head, float* partials) {
    static thread_local Arena arena;
    State s = reserve_state(a, sizeof(T), arena);
    const int64_t first_head = kv_head * s.group_size, position = a.seq_lens[unit.seq] - 1;
    const T* query = static_cast<const T*>(a.query) + a.query_start_loc[unit.seq] * a.query_stride_token +
                     first_head * a.query_stride_head;
    write_tile_offsets(a, unit, kv_head, unit.kv_begin, s.tile, s.offsets);
    for (int64_t begin = unit.kv_begin; begin < unit.kv_end; begin += s.tile) {
        const int64_t count = std::min(s.tile, unit.kv_end - begin);
        write_tile_offsets(a, unit, kv_head, begin + s.tile, s.tile, s.next_offsets);
        score_tile(a, query, first_head, begin - position, count, s);
        for (int64_t g = 0; g < s.group_size; ++g) update_softmax(g, count, s);
        s_next_keys<T> = begin + 2*s.tile <= unit.kv_end ? static_cast<const T*>(a.key_cache) : nullptr;
        add_value_tile(static_cast<const T*>(a.value_cache), count, s);
        std::swap(s.offsets, s.next_offsets);
    }
    write_result<T>(a, unit, first_head, partials, s);
}

template void attend_decode<float>(const AttentionArguments&, const Unit&, int64_t, float*);
template void attend_decode<bf16>(const AttentionArguments&, const Unit&, int64_t, float*);

}  // namespace quire
