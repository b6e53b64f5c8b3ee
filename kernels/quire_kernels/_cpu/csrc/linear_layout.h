// The packed layout of a linear layer's weight, and the arguments of the matrix product.
//
// weight[N][K] (bf16, rows are output features) is cut into panels of 32 rows, a panel into steps of 32 in k, a step
// into two tiles of 16 rows. In a tile two neighbours in k lie side by side:
//
//     panel p, step s       | n = 32p           | n = 32p+1         | ... | n = 32p+15            |
//     tile 0   k = 32s, +1  | w[n][k] w[n][k+1] | w[n][k] w[n][k+1] | ... | w[n][k] w[n][k+1]     |  64 bytes
//              k = 32s+2,+3 |        ...
//              ...          |                                                                        16 lines: 1 KiB
//              k = 32s+30   |
//     tile 1   the same for n = 32p+16 ... 32p+31
//
// so packed[num_panels][K / 32][2][16][16][2]. K is rounded up to 32 with zeros, N with
// anything: what those features would be is never stored. A panel is one stretch of
// K * 64 bytes that is read once from its begin to its end, and
//   * one line of a tile is a vector whose 32-bit lanes hold the pairs that vdpbf16ps multiplies with one pair of x;
//   * a tile is a B operand of tdpbf16ps;
//   * with AVX2 the two members of a pair become float32 by one shift and one mask.
// 32 columns rather than 64: small layers then still divide evenly among threads.
#pragma once

#include "common.h"

namespace quire {

constexpr int64_t kPanel = 32;               // output features per panel
constexpr int64_t kStep = 32;                // k per step
constexpr int64_t kTileColumns = 16;         // output features per tile
constexpr int64_t kLine = 2 * kTileColumns;  // elements in one line of a tile: 64 bytes
constexpr int64_t kTile = kStep / 2 * kLine;
constexpr int64_t kStepSize = 2 * kTile;

QUIRE_INLINE int64_t num_panels(int64_t n) { return ceil_div(n, kPanel); }
QUIRE_INLINE int64_t num_steps(int64_t k) { return ceil_div(k, kStep); }
QUIRE_INLINE int64_t padded_k(int64_t k) { return num_steps(k) * kStep; }

// What a call passes, as one struct of 64-bit words: _pack_arguments in linear.py.
struct LinearArguments {
    const bf16* x;  // [num_rows, k], row stride stride_x
    int64_t stride_x, num_rows;
    const bf16* packed;
    int64_t n, k;
    const void* bias;  // [n] or null
    int64_t is_bias_float;
    void* out;  // [num_rows, n], row stride stride_out
    int64_t stride_out, is_out_float;

    QUIRE_INLINE const bf16* panel(int64_t index) const { return packed + index * num_steps(k) * kStepSize; }
};
static_assert(sizeof(LinearArguments) == 11 * 8, "linear.py packs eleven words");

// A block of rows of x as a kernel reads it: x itself, or a copy that is padded to padded_k(k), widened or cut into
// tiles.
template <typename T>
struct RowBlock {
    const T* rows;
    int64_t stride, count, first_row;
};

// How the sums of one panel become output: the bias is added, features past the last one are cut off, the rest is
// rounded.
struct PanelOutput {
    alignas(64) float bias[kPanel];
    int64_t column;
    bool is_whole;     // all 32 features exist
    bool is_streamed;  // written past the caches; only set where rows of the output are whole cache lines

    void open(const LinearArguments& a, int64_t panel, bool is_large) {
        column = panel * kPanel;
        is_whole = a.n - column >= kPanel;
        is_streamed = is_large;
        for (int64_t i = 0; i < kPanel; i += kVecWidth) {
            const int64_t left = a.n - column - i, count = left < 0 ? 0 : left > kVecWidth ? kVecWidth : left;
            Vec value = vec_zero();
            if (a.bias != nullptr && a.is_bias_float) value = vec_load((const float*)a.bias + column + i, count);
            if (a.bias != nullptr && !a.is_bias_float) value = vec_load((const bf16*)a.bias + column + i, count);
            vec_store(bias + i, value);
        }
    }

    // The features [i, i + kVecWidth) of the panel.
    QUIRE_INLINE void store(const LinearArguments& a, int64_t row, int64_t i, Vec sums) const {
        const Vec value = sums + vec_load(bias + i);
        const int64_t left = a.n - column - i;
        if (left <= 0) return;
        const int64_t at = row * a.stride_out + column + i, count = left > kVecWidth ? kVecWidth : left;
        if (a.is_out_float) vec_store((float*)a.out + at, value, count);
        else vec_store((bf16*)a.out + at, value, count);
    }

#if defined(QUIRE_HAS_AVX512)
    // All features of the panel.
    QUIRE_INLINE void store_row(const LinearArguments& a, int64_t row, Vec left, Vec right) const {
        if (!is_whole) {
            store(a, row, 0, left);
            store(a, row, kVecWidth, right);
            return;
        }
        left = left + vec_load(bias);
        right = right + vec_load(bias + kVecWidth);
        const int64_t at = row * a.stride_out + column;
        if (a.is_out_float) {
            store_line((float*)a.out + at, _mm512_castps_si512(left.v));
            store_line((float*)a.out + at + kVecWidth, _mm512_castps_si512(right.v));
        } else {
            store_line((bf16*)a.out + at, (__m512i)_mm512_cvtne2ps_pbh(right.v, left.v));
        }
    }

    QUIRE_INLINE void store_line(void* target, __m512i line) const {
        if (is_streamed) _mm512_stream_si512((__m512i*)target, line);
        else _mm512_storeu_si512(target, line);
    }
#endif
};

}  // namespace quire
