// The matrix product with AVX-512-BF16: vdpbf16ps of a broadcast pair of x with 16 pairs of the weight.
#pragma once

#include "linear_layout.h"

#if defined(QUIRE_HAS_AVX512)

namespace quire {

constexpr int kMaxRows = 12;  // 12 rows x 32 columns of sums leave registers for two weight vectors and one pair
using XElement = bf16;

QUIRE_INLINE __m512bh load_pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }

QUIRE_INLINE __m512bh broadcast_pair(const bf16* p) {
    int pair;
    std::memcpy(&pair, p, sizeof(pair));
    return (__m512bh)_mm512_set1_epi32(pair);
}

// How far ahead of each stream the weights are asked for; about what memory delivers within its latency.
constexpr int64_t kPrefetchBytes = 2048;

// sums += the pairs of x at `pairs` (one per row) times one line of each tile.
template <int kRows>
QUIRE_INLINE void add_line(const bf16* line, const bf16* pairs, int64_t stride, __m512 (&sums)[kRows][2]) {
    _mm_prefetch((const char*)line + kPrefetchBytes, _MM_HINT_T0);
    _mm_prefetch((const char*)(line + kTile) + kPrefetchBytes, _MM_HINT_T0);
    const __m512bh left = load_pairs(line), right = load_pairs(line + kTile);
    for (int r = 0; r < kRows; ++r) {
        const __m512bh pair = broadcast_pair(pairs + r * stride);
        sums[r][0] = _mm512_dpbf16_ps(sums[r][0], left, pair);
        sums[r][1] = _mm512_dpbf16_ps(sums[r][1], right, pair);
    }
}

// Rows x one panel over all of K. With few rows memory is the limit: K is then cut into parts that are read side by
// side, because one core keeps more cache lines in flight over several streams than over one; that also hides the
// latency of vdpbf16ps.
template <int kRows>
void multiply_rows(const LinearArguments& a, const RowBlock<bf16>& x, int64_t row, int64_t panel,
                   const PanelOutput& output) {
    constexpr int kStreams = kRows == 1 ? 4 : kRows <= 4 ? 2 : 1;
    const bf16* rows = x.rows + row * x.stride;
    const bf16* weights = a.panel(panel);
    const int64_t steps = num_steps(a.k), part = steps / kStreams;
    __m512 sums[kStreams][kRows][2];
    for (int s = 0; s < kStreams; ++s) {
        for (int r = 0; r < kRows; ++r) sums[s][r][0] = sums[s][r][1] = _mm512_setzero_ps();
    }
    for (int64_t step = 0; step < part; ++step) {
        for (int64_t i = 0; i < kStep / 2; ++i) {
            for (int s = 0; s < kStreams; ++s) {
                const int64_t at = s * part + step;
                add_line<kRows>(weights + at * kStepSize + i * kLine, rows + at * kStep + i * 2, x.stride, sums[s]);
            }
        }
    }
    for (int64_t at = part * kStreams; at < steps; ++at) {
        for (int64_t i = 0; i < kStep / 2; ++i) {
            add_line<kRows>(weights + at * kStepSize + i * kLine, rows + at * kStep + i * 2, x.stride, sums[0]);
        }
    }
    for (int r = 0; r < kRows; ++r) {
        Vec left = {sums[0][r][0]}, right = {sums[0][r][1]};
        for (int s = 1; s < kStreams; ++s) {
            left = left + Vec{sums[s][r][0]};
            right = right + Vec{sums[s][r][1]};
        }
        output.store_row(a, x.first_row + row + r, left, right);
    }
}

}  // namespace quire

#endif
