// Decode with vector instructions: lanes are elements of a head.
//
// Scores: kVecWidth keys at a time, one accumulator each, whose lanes are then summed by a tree of shuffles into one
// vector of scores. Outputs: up to kHeadsAtOnce heads x kVecsAtOnce vectors of accumulators over a tile of values.
#pragma once

#include "attention_decode.h"

namespace quire {

#if defined(QUIRE_HAS_AVX512)
constexpr int kHeadsAtOnce = 6;
constexpr int kVecsAtOnce = 4;
#else
constexpr int kHeadsAtOnce = 4;
constexpr int kVecsAtOnce = 2;
#endif

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

// Fills s.scores for the tile; prefetches its values meanwhile.
template <typename T>
void score_tile(const AttentionArguments& a, const T* query, int64_t first_head, int64_t distance, DecodeState& s) {
    const ScoreRule rule(a);
    const T* keys = static_cast<const T*>(a.key_cache);
    const T* values = static_cast<const T*>(a.value_cache);
    for (int64_t t = 0; t < s.count; t += kVecWidth) {
        for (int64_t i = t; i < std::min(s.count, t + kVecWidth); ++i) prefetch_row(values + s.offsets[i], s.head_dim);
        for (int64_t g = 0; g < s.group_size; ++g) {
            const Vec dots = dot_keys(query + g * a.query_stride_head, keys, s.offsets + t, s.head_dim);
            const Vec scores = finish_scores(a, rule, dots, first_head + g, distance + t, s.count - t);
            vec_store(s.scores + g * kDecodeTile + t, scores);
        }
    }
}

// out[g] = out[g] * rescale + weights * values, for kHeads heads from `g` and kVecs vectors from element `d`; the last
// vector has `last_count` elements.
template <typename T, int kHeads, int kVecs>
void add_values(const T* values, const T* next_keys, int64_t g, int64_t d, int64_t last_count, DecodeState& s) {
    const int64_t num_prefetched = g == 0 && d == 0 ? s.next_count : 0;
    Vec sums[kHeads][kVecs];
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
            sums[h][v] = vec_load(s.out + (g + h) * s.out_stride + d + v * kVecWidth) * vec_set(s.rescale[g + h]);
        }
    }
    const float* weights = s.scores + g * kDecodeTile;
    const auto add = [&](int64_t t, const Vec* row) {
#pragma GCC unroll 8
        for (int h = 0; h < kHeads; ++h) {
            const Vec weight = vec_set(weights[h * kDecodeTile + t]);
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) sums[h][v] = vec_fma(weight, row[v], sums[h][v]);
        }
    };
    for (int64_t t = 0; t < s.count; ++t) {
        const T* source = values + s.offsets[t] + d;
        if (t < num_prefetched) prefetch_row(next_keys + s.next_offsets[t], s.head_dim);
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
        for (int v = 0; v < kVecs; ++v) vec_store(s.out + (g + h) * s.out_stride + d + v * kVecWidth, sums[h][v]);
    }
}

template <typename T, int kVecs>
void add_values_for_heads(const T* values, const T* next_keys, int64_t d, int64_t last_count, DecodeState& s) {
    for (int64_t g = 0; g < s.group_size;) {
        const int64_t left = s.group_size - g;
        const int64_t heads = left > kHeadsAtOnce && left < 2 * kHeadsAtOnce ? (left + 1) / 2 : left;
        switch (std::min<int64_t>(heads, kHeadsAtOnce)) {
            case 1: add_values<T, 1, kVecs>(values, next_keys, g, d, last_count, s), g += 1; break;
            case 2: add_values<T, 2, kVecs>(values, next_keys, g, d, last_count, s), g += 2; break;
            case 3: add_values<T, 3, kVecs>(values, next_keys, g, d, last_count, s), g += 3; break;
            case 4: add_values<T, 4, kVecs>(values, next_keys, g, d, last_count, s), g += 4; break;
#if defined(QUIRE_HAS_AVX512)
            case 5: add_values<T, 5, kVecs>(values, next_keys, g, d, last_count, s), g += 5; break;
            default: add_values<T, 6, kVecs>(values, next_keys, g, d, last_count, s), g += 6; break;
#endif
        }
    }
}

// Adds the tile's weighted values to every head's output; prefetches the next tile's keys meanwhile.
template <typename T>
void add_value_tile(const T* values, const T* next_keys, DecodeState& s) {
    for (int64_t d = 0; d < s.head_dim; d += kVecsAtOnce * kVecWidth) {
        const int64_t elements = std::min<int64_t>(s.head_dim - d, kVecsAtOnce * kVecWidth);
        const int64_t vecs = ceil_div(elements, kVecWidth), last_count = elements - (vecs - 1) * kVecWidth;
        switch (vecs) {
            case 1: add_values_for_heads<T, 1>(values, next_keys, d, last_count, s); break;
            case 2: add_values_for_heads<T, 2>(values, next_keys, d, last_count, s); break;
#if defined(QUIRE_HAS_AVX512)
            case 3: add_values_for_heads<T, 3>(values, next_keys, d, last_count, s); break;
            default: add_values_for_heads<T, 4>(values, next_keys, d, last_count, s); break;
#endif
        }
    }
}

}  // namespace quire
