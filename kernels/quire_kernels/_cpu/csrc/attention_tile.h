// Tiles of the prefill kernel: how keys, values, queries and weights are packed, and the product of packed tiles.
//
// Both products of attention have the same form, with queries in the vector lanes and kVecWidth of them to a block:
//
//   scores[key][query]      = sum over elements of  key[key][element]  * query[element][query]
//   out[element][query]    += sum over keys of      value[element][key] * weight[key][query]
//
// so the left operand is read one scalar at a time (or as an AMX tile of rows) and softmax never leaves its lane. With
// bfloat16 products (AVX-512 and AMX) depth runs in pairs: left rows are contiguous in depth, the right operand is
// [depth / 2][kVecWidth][2], which is also how AMX wants it. Otherwise tiles are float32 and the right one is
// [depth][kVecWidth].
#pragma once

#include "attention.h"

#include <algorithm>
#include <type_traits>

namespace quire {

#if defined(QUIRE_HAS_AVX512)
template <typename T>
using TileElement = T;
#else
template <typename T>
using TileElement = float;
#endif

template <typename T>
constexpr bool kIsPaired = std::is_same_v<TileElement<T>, bf16>;

// Elements of a head are padded (with zeros) to a multiple of this.
constexpr int64_t kDepthMultiple = 32;

// The left operand: element (row, depth) lies at row * stride_row + depth * stride_depth; for bf16 stride_depth is 1.
template <typename E>
struct LeftTile {
    const E* data;
    int64_t stride_row, stride_depth;
};

// ----------------------------------------------------------------------------------------------------------- transpose

#if defined(QUIRE_HAS_AVX512)

// Transposes 16 x 16 words of 32 bits.
QUIRE_INLINE void transpose(Vec* rows) {
    __m512 a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
        a[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        const auto low = [&](int x, int y) {
            return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a[i + x]), _mm512_castps_pd(a[i + y])));
        };
        const auto high = [&](int x, int y) {
            return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a[i + x]), _mm512_castps_pd(a[i + y])));
        };
        b[i] = low(0, 2);
        b[i + 1] = high(0, 2);
        b[i + 2] = low(1, 3);
        b[i + 3] = high(1, 3);
    }
    // b[4 r + c] holds, in its four quarters, column 4 q + c of rows 4 r to 4 r + 3.
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512 even_low = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88);
        const __m512 odd_low = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
        const __m512 even_high = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
        const __m512 odd_high = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
        rows[c].v = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
        rows[8 + c].v = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
        rows[4 + c].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
        rows[12 + c].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
}

#else

// Transposes 8 x 8 words of 32 bits.
QUIRE_INLINE void transpose(Vec* rows) {
    __m256 a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
        a[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        rows[c].v = _mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
        rows[4 + c].v = _mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
    }
}

#endif

// ------------------------------------------------------------------------------------------------------------- packing

// Packs kVecWidth queries (rows of `head_dim` elements) as a right operand of `padded_dim` deep.
template <typename T>
void pack_queries(const T* const* rows, int64_t head_dim, int64_t padded_dim, TileElement<T>* target) {
    constexpr int64_t kPerWord = kIsPaired<T> ? 2 : 1;
    for (int64_t d = 0; d < padded_dim; d += kVecWidth * kPerWord) {
        const int64_t count = std::clamp<int64_t>(head_dim - d, 0, kVecWidth * kPerWord);
        Vec words[kVecWidth];
        for (int i = 0; i < kVecWidth; ++i) {
            if constexpr (kIsPaired<T>) {
#if defined(QUIRE_HAS_AVX512)
                const __mmask32 mask = count == 32 ? ~0u : (1u << count) - 1u;
                words[i].v = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, rows[i] + d));
#endif
            } else {
                words[i] = vec_load(rows[i] + d, count);
            }
        }
        transpose(words);
        for (int i = 0; i < kVecWidth; ++i) {
            vec_store(reinterpret_cast<float*>(target + d * kVecWidth) + i * kVecWidth, words[i]);
        }
    }
}

// Copies a row of `head_dim` elements and pads it with zeros.
template <typename T>
void copy_row(const T* source, int64_t head_dim, int64_t padded_dim, TileElement<T>* target) {
    if constexpr (std::is_same_v<TileElement<T>, T>) {
        std::memcpy(target, source, static_cast<size_t>(head_dim) * sizeof(T));
    } else {
        int64_t d = 0;
        for (; d + kVecWidth <= head_dim; d += kVecWidth) vec_store(target + d, vec_load(source + d));
        if (d < head_dim) vec_store(target + d, vec_load(source + d, head_dim - d), head_dim - d);
    }
    std::memset(target + head_dim, 0, static_cast<size_t>(padded_dim - head_dim) * sizeof(*target));
}

// [padded_count][padded_dim]; rows from `count` are zero.
template <typename T>
void pack_rows(const T* cache, const int64_t* offsets, int64_t count, int64_t padded_count, int64_t head_dim,
               int64_t padded_dim, TileElement<T>* target) {
    for (int64_t t = 0; t < count; ++t) copy_row(cache + offsets[t], head_dim, padded_dim, target + t * padded_dim);
    const int64_t rest = (padded_count - count) * padded_dim;
    std::memset(target + count * padded_dim, 0, static_cast<size_t>(rest) * sizeof(*target));
}

#if defined(QUIRE_HAS_AVX512)

// Packs 32 values x 32 elements transposed: target[element * stride + key].
inline void transpose_values(const bf16* const* rows, int64_t count, int64_t elements, bf16* target, int64_t stride) {
    const __mmask32 mask = elements == 32 ? ~0u : (1u << elements) - 1u;
    Vec low[16], high[16];
    for (int64_t i = 0; i < 16; ++i) {
        const auto load = [&](int64_t t) {
            return t < count ? _mm512_maskz_loadu_epi16(mask, rows[t]) : _mm512_setzero_si512();
        };
        const __m512i even = load(2 * i), odd = load(2 * i + 1);
        low[i].v = _mm512_castsi512_ps(_mm512_unpacklo_epi16(even, odd));
        high[i].v = _mm512_castsi512_ps(_mm512_unpackhi_epi16(even, odd));
    }
    transpose(low);
    transpose(high);
    // Unpacking works on quarters of eight elements: `low` has the first four of each, `high` the last four.
    for (int64_t i = 0; i < 16; ++i) {
        bf16* row = target + (i / 4 * 8 + i % 4) * stride;
        _mm512_storeu_ps(row, low[i].v);
        _mm512_storeu_ps(row + 4 * stride, high[i].v);
    }
}

// [padded_dim][padded_count], keys in depth; whatever is not a value is zero.
inline void pack_values(const bf16* cache, const int64_t* offsets, int64_t count, int64_t padded_count,
                        int64_t head_dim, int64_t padded_dim, bf16* target) {
    for (int64_t t = 0; t < padded_count; t += 32) {
        const int64_t keys = std::clamp<int64_t>(count - t, 0, 32);
        for (int64_t d = 0; d < padded_dim; d += 32) {
            const bf16* rows[32];
            for (int64_t i = 0; i < keys; ++i) rows[i] = cache + offsets[t + i] + d;
            const int64_t elements = std::min<int64_t>(32, head_dim - d);
            transpose_values(rows, keys, elements, target + d * padded_count + t, padded_count);
        }
    }
}

#endif

// Packs the values of a tile as a left operand with keys in depth.
template <typename T>
LeftTile<TileElement<T>> pack_value_tile(const T* cache, const int64_t* offsets, int64_t count, int64_t padded_count,
                                         int64_t head_dim, int64_t padded_dim, TileElement<T>* target) {
    if constexpr (kIsPaired<T>) {
#if defined(QUIRE_HAS_AVX512)
        pack_values(cache, offsets, count, padded_count, head_dim, padded_dim, target);
        return {target, padded_count, 1};
#endif
    } else {
        pack_rows(cache, offsets, count, padded_count, head_dim, padded_dim, target);
        return {target, 1, padded_dim};
    }
}

// ------------------------------------------------------------------------------------------------------------- product

// sums[block][row][lane] = (or +=) sum over depth of left(row, depth) * right[block](depth, lane), for kRows rows.
template <int kRows, int kBlocks>
QUIRE_INLINE void multiply_rows(LeftTile<float> left, const float* right, int64_t right_stride, int64_t depth,
                                bool is_added, float* sums, int64_t sums_stride) {
    Vec acc[kRows][kBlocks];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int b = 0; b < kBlocks; ++b) {
            acc[r][b] = is_added ? vec_load(sums + b * sums_stride + r * kVecWidth) : vec_zero();
        }
    }
    for (int64_t k = 0; k < depth; ++k) {
        Vec columns[kBlocks];
#pragma GCC unroll 2
        for (int b = 0; b < kBlocks; ++b) columns[b] = vec_load(right + b * right_stride + k * kVecWidth);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const Vec scalar = vec_set(left.data[r * left.stride_row + k * left.stride_depth]);
#pragma GCC unroll 2
            for (int b = 0; b < kBlocks; ++b) acc[r][b] = vec_fma(scalar, columns[b], acc[r][b]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int b = 0; b < kBlocks; ++b) vec_store(sums + b * sums_stride + r * kVecWidth, acc[r][b]);
    }
}

#if defined(QUIRE_HAS_AVX512)

template <int kRows, int kBlocks>
QUIRE_INLINE void multiply_rows(LeftTile<bf16> left, const bf16* right, int64_t right_stride, int64_t depth,
                                bool is_added, float* sums, int64_t sums_stride) {
    __m512 acc[kRows][kBlocks];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int b = 0; b < kBlocks; ++b) {
            acc[r][b] = is_added ? _mm512_loadu_ps(sums + b * sums_stride + r * kVecWidth) : _mm512_setzero_ps();
        }
    }
    for (int64_t k = 0; k < depth; k += 2) {
        __m512bh columns[kBlocks];
#pragma GCC unroll 2
        for (int b = 0; b < kBlocks; ++b) {
            columns[b] = (__m512bh)_mm512_loadu_si512(right + b * right_stride + k * kVecWidth);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            int32_t pair;
            std::memcpy(&pair, left.data + r * left.stride_row + k, sizeof(pair));
            const __m512bh scalars = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
            for (int b = 0; b < kBlocks; ++b) acc[r][b] = _mm512_dpbf16_ps(acc[r][b], scalars, columns[b]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int b = 0; b < kBlocks; ++b) _mm512_storeu_ps(sums + b * sums_stride + r * kVecWidth, acc[r][b]);
    }
}

#endif

// The product for `rows` rows (a multiple of 32) and kBlocks blocks of queries.
template <int kBlocks, typename E>
void multiply_vectors(LeftTile<E> left, const E* right, int64_t right_stride, int64_t rows, int64_t depth,
                      bool is_added, float* sums, int64_t sums_stride) {
#if defined(QUIRE_HAS_AVX512)
    constexpr int kRows = 8;
#else
    constexpr int kRows = 4;
#endif
    for (int64_t row = 0; row < rows; row += kRows) {
        const LeftTile<E> part{left.data + row * left.stride_row, left.stride_row, left.stride_depth};
        multiply_rows<kRows, kBlocks>(part, right, right_stride, depth, is_added, sums + row * kVecWidth, sums_stride);
    }
}

}  // namespace quire
