// The matrix product with AVX2: bf16 weights widen to float32 in registers, x is widened once per block of rows.
#pragma once

#include "linear_layout.h"

#if !defined(QUIRE_HAS_AVX512)

namespace quire {

constexpr int kMaxRows = 6;  // 6 rows x 16 columns of accumulators leave three registers for operands
using XElement = float;
constexpr int64_t kPrefetchBytes = 2048;  // how far ahead one row asks for weights

// Rows x 16 columns: half of a panel.
template <int kRows>
void multiply_half(const LinearArguments& a, const RowBlock<float>& x, int64_t row, int64_t panel, int64_t half,
                   const PanelOutput& output) {
    const __m256i high_mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    const bf16* w = a.panel(panel) + half * kTile;
    const float* rows = x.rows + row * x.stride;
    __m256 sum[kRows][2];
    for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_ps();
    for (int64_t k = 0; k < x.stride; k += 2, w += k % kStep ? kLine : kLine + kTile) {
        const __m256i raw0 = _mm256_loadu_si256((const __m256i*)w), raw1 = _mm256_loadu_si256((const __m256i*)(w + 16));
        const __m256 even0 = _mm256_castsi256_ps(_mm256_slli_epi32(raw0, 16));
        const __m256 even1 = _mm256_castsi256_ps(_mm256_slli_epi32(raw1, 16));
        for (int r = 0; r < kRows; ++r) {
            const __m256 value = _mm256_broadcast_ss(rows + r * x.stride + k);
            sum[r][0] = _mm256_fmadd_ps(value, even0, sum[r][0]);
            sum[r][1] = _mm256_fmadd_ps(value, even1, sum[r][1]);
        }
        const __m256 odd0 = _mm256_castsi256_ps(_mm256_and_si256(raw0, high_mask));
        const __m256 odd1 = _mm256_castsi256_ps(_mm256_and_si256(raw1, high_mask));
        for (int r = 0; r < kRows; ++r) {
            const __m256 value = _mm256_broadcast_ss(rows + r * x.stride + k + 1);
            sum[r][0] = _mm256_fmadd_ps(value, odd0, sum[r][0]);
            sum[r][1] = _mm256_fmadd_ps(value, odd1, sum[r][1]);
        }
    }
    for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < 2; ++i) {
            output.store(a, x.first_row + row + r, half * 16 + i * 8, {sum[r][i]});
        }
    }
}

template <int kRows>
void multiply_rows(const LinearArguments& a, const RowBlock<float>& x, int64_t row, int64_t panel,
                   const PanelOutput& output) {
    multiply_half<kRows>(a, x, row, panel, 0, output);
    multiply_half<kRows>(a, x, row, panel, 1, output);
}

// One row reads its panel once, in order, and has enough accumulators to hide the latency of an FMA.
template <>
QUIRE_INLINE void multiply_rows<1>(const LinearArguments& a, const RowBlock<float>& x, int64_t row, int64_t panel,
                                   const PanelOutput& output) {
    const __m256i high_mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    const bf16* w = a.panel(panel);
    const float* values = x.rows + row * x.stride;
    __m256 even[4], odd[4];
    for (int i = 0; i < 4; ++i) even[i] = odd[i] = _mm256_setzero_ps();
    for (int64_t k = 0; k < x.stride; k += 2, w += k % kStep ? kLine : kLine + kTile) {
        _mm_prefetch((const char*)w + kPrefetchBytes, _MM_HINT_T0);
        _mm_prefetch((const char*)(w + kTile) + kPrefetchBytes, _MM_HINT_T0);
        const __m256 value0 = _mm256_broadcast_ss(values + k), value1 = _mm256_broadcast_ss(values + k + 1);
        for (int i = 0; i < 4; ++i) {
            const __m256i raw = _mm256_loadu_si256((const __m256i*)(w + i / 2 * kTile + i % 2 * 16));
            even[i] = _mm256_fmadd_ps(value0, _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16)), even[i]);
            odd[i] = _mm256_fmadd_ps(value1, _mm256_castsi256_ps(_mm256_and_si256(raw, high_mask)), odd[i]);
        }
    }
    for (int i = 0; i < 4; ++i) {
        output.store(a, x.first_row + row, i * 8, {_mm256_add_ps(even[i], odd[i])});
    }
}

}  // namespace quire

#endif
