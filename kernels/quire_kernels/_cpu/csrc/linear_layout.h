// The packed layout of a linear layer's weight, and the arguments of the matrix product.
//
// weight[N][K] (bf16, rows are output features) is cut into panels of 32 rows, a panel into steps of 32 in k, a step into two
// tiles of 16 rows. In a tile two neighbours in k lie side by side:
//
//     panel p, step s       | n = 32p           | n = 32p+1         | ... | n = 32p+15            |
//     tile 0   k = 32s, +1  | w[n][k] w[n][k+1] | w[n][k] w[n][k+1] | ... | w[n][k] w[n][k+1]     |  64 bytes
//              k = 32s+2,+3 |        ...
//              ...          |                                                                        16 lines: 1 KiB
//              k = 32s+30   |
//     tile 1   the same for n = 32p+16 ... 32p+31
//
// so packed[num_panels][K / 32][2][16][16][2]. N and K are rounded up to 32; what is added is zero. A panel is one stretch of
// K * 64 bytes that is read once from its begin to its end, and
//   * one line of a tile is a vector whose 32-bit lanes hold the pairs that vdpbf16ps multiplies with a broadcast pair of x;
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

// A block of rows of x as a kernel reads it: x itself, or a copy that is padded to padded_k(k), widened or cut into tiles.
template <typename T>
struct RowBlock {
    const T* rows;
    int64_t stride, count, first_row;
};

// The bias of one panel as float32; zero without bias and past the last output feature.
struct PanelBias {
    alignas(64) float values[kPanel];

    QUIRE_INLINE void load(const LinearArguments& a, int64_t panel) {
        const int64_t n0 = panel * kPanel;
        for (int64_t i = 0; i < kPanel; i += kVecWidth) {
            const int64_t left = a.n - n0 - i;
            const int64_t count = left < 0 ? 0 : left > kVecWidth ? kVecWidth : left;
            Vec value = vec_zero();
            if (a.bias != nullptr && a.is_bias_float) value = vec_load((const float*)a.bias + n0 + i, count);
            if (a.bias != nullptr && !a.is_bias_float) value = vec_load((const bf16*)a.bias + n0 + i, count);
            vec_store(values + i, value);
        }
    }
};

// out[row][column .. column + kVecWidth) = sum + bias, cut off at n.
QUIRE_INLINE void store_sum(const LinearArguments& a, int64_t row, int64_t column, Vec sum, const float* bias) {
    const Vec value = sum + vec_load(bias);
    const int64_t left = a.n - column;
    if (left <= 0) return;
    const int64_t at = row * a.stride_out + column;
    if (a.is_out_float) {
        float* target = (float*)a.out + at;
        left >= kVecWidth ? vec_store(target, value) : vec_store(target, value, left);
    } else {
        bf16* target = (bf16*)a.out + at;
        left >= kVecWidth ? vec_store(target, value) : vec_store(target, value, left);
    }
}

}  // namespace quire
