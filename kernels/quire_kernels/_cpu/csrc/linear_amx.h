// The matrix product with AMX: 32 rows x 32 columns of sums in four tiles, 32 deep per step.
//
//                 B0 (tile 6)   B1 (tile 7)       one panel, 32 of k
//     A0 (tile 4)  C00 tile 0    C01 tile 1
//     A1 (tile 5)  C10 tile 2    C11 tile 3
#pragma once

#include "linear_layout.h"

#if defined(QUIRE_HAS_AMX)

namespace quire {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 64;
constexpr int64_t kTileDepth = 32;
constexpr int64_t kMinAmxRows = 4;  // below, a vector kernel is as fast

// The operand of ldtilecfg, palette 1.
struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t column_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles for `rows` (1 to 32) rows of x; the second row of tiles is unused (but valid) up to 16.
QUIRE_INLINE void configure_tiles(int64_t rows) {
    const int64_t upper = rows < kTileRows ? rows : kTileRows;
    const int64_t lower = rows > kTileRows ? rows - kTileRows : 1;
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) config.column_bytes[tile] = kTileBytes;
    config.rows[0] = config.rows[1] = config.rows[4] = static_cast<uint8_t>(upper);
    config.rows[2] = config.rows[3] = config.rows[5] = static_cast<uint8_t>(lower);
    config.rows[6] = config.rows[7] = kTileRows;
    _tile_loadconfig(&config);
}

// A finished block of sums that waits to be rounded and stored while the tiles work on the next one.
struct PendingBlock {
    const float* sums = nullptr;  // [32][32]
    const float* bias = nullptr;
    int64_t row = 0, rows = 0, column = 0;  // rows: how many are still to be stored, from `row` on

    QUIRE_INLINE void store(const LinearArguments& a, int64_t count) {
        for (; count > 0 && rows > 0; --count, --rows, ++row, sums += kPanel) {
            const Vec left = vec_load(sums), right = vec_load(sums + kVecWidth);
            if (!a.is_out_float && a.n - column >= kPanel) {
                const __m512 low = (left + vec_load(bias)).v, high = (right + vec_load(bias + kVecWidth)).v;
                _mm512_storeu_si512((bf16*)a.out + row * a.stride_out + column, (__m512i)_mm512_cvtne2ps_pbh(high, low));
            } else {
                store_sum(a, row, column, left, bias);
                store_sum(a, row, column + kVecWidth, right, bias + kVecWidth);
            }
        }
    }
};

// Up to 16 rows (kHasLower: 17 to 32) x one panel over all of K into sums[32][32]. In each step a piece of `pending` is
// stored and a piece of the weights that come next is asked for.
template <bool kHasLower>
QUIRE_INLINE void multiply_tiles(const LinearArguments& a, const bf16* x, int64_t stride_x, const bf16* panel, float* sums,
                                 PendingBlock& pending, const char* next, int lines_per_step) {
    constexpr int64_t kSumStride = kPanel * sizeof(float);
    const int64_t stride_x_bytes = stride_x * static_cast<int64_t>(sizeof(bf16));
    const int64_t steps = num_steps(a.k), rows_per_step = ceil_div(pending.rows, steps);
    _tile_zero(0);
    _tile_zero(1);
    if (kHasLower) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; ++step, panel += kStepSize, x += kStep) {
        for (int i = 0; i < lines_per_step; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T1);
        _tile_loadd(6, panel, kTileBytes);
        _tile_loadd(4, x, stride_x_bytes);
        if (kHasLower) _tile_loadd(5, x + kTileRows * stride_x, stride_x_bytes);
        _tile_loadd(7, panel + kTile, kTileBytes);
        _tile_dpbf16ps(0, 4, 6);
        if (kHasLower) _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (kHasLower) _tile_dpbf16ps(3, 5, 7);
        pending.store(a, rows_per_step);
    }
    _tile_stored(0, sums, kSumStride);
    _tile_stored(1, sums + kTileRows, kSumStride);
    if (kHasLower) {
        _tile_stored(2, sums + kTileRows * kPanel, kSumStride);
        _tile_stored(3, sums + kTileRows * kPanel + kTileRows, kSumStride);
    }
}

// All rows of a block x the panels [begin, end). The rows that do not fill 32 come last: they need other tile shapes.
inline void multiply_block_amx(const LinearArguments& a, const RowBlock<bf16>& x, Range panels) {
    alignas(64) float sums[2][2 * kTileRows * kPanel];
    PendingBlock pending;
    int turn = 0;
    const auto run = [&](Range rows) {
        if (rows.begin == rows.end) return;
        const int64_t groups = ceil_div(rows.end - rows.begin, 2 * kTileRows);
        const int lines_per_step = static_cast<int>(ceil_div(kStepSize * 2 / 64, groups));
        const int64_t next_share = num_steps(a.k) * lines_per_step * 64;
        for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
            pending.store(a, pending.rows);
            const PanelBias bias(a, panel);
            const char* next = (const char*)a.panel(panel + 1);
            for (int64_t row = rows.begin; row < rows.end; row += 2 * kTileRows, next += next_share, turn ^= 1) {
                const int64_t count = rows.end - row < 2 * kTileRows ? rows.end - row : 2 * kTileRows;
                const bf16* source = x.rows + row * x.stride;
                if (count > kTileRows) multiply_tiles<true>(a, source, x.stride, a.panel(panel), sums[turn], pending, next, lines_per_step);
                else multiply_tiles<false>(a, source, x.stride, a.panel(panel), sums[turn], pending, next, lines_per_step);
                pending = {sums[turn], bias.values, x.first_row + row, count, panel * kPanel};
            }
            pending.store(a, pending.rows);
        }
    };
    const int64_t whole = x.count / (2 * kTileRows) * (2 * kTileRows);
    if (whole > 0) configure_tiles(2 * kTileRows);
    run({0, whole});
    if (whole < x.count) configure_tiles(x.count - whole);
    run({whole, x.count});
    _tile_release();  // an unused tile state costs nothing at a context switch
}

}  // namespace quire

#endif
