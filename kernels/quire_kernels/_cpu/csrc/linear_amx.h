// The matrix product with AMX: 32 rows x 32 columns of sums in four tiles, 32 deep per step.
//
//                 B0 (tile 6)   B1 (tile 7)       one step of a panel
//     A0 (tile 4)  C00 tile 0    C01 tile 1
//     A1 (tile 5)  C10 tile 2    C11 tile 3
//
// Up to 16 rows memory is the limit; A0 and A1 then are the same rows in the two halves of K, so that the weights are
// read in two streams, and the two halves of the sums are added when they are stored.
#pragma once

#include "linear_layout.h"

#if defined(QUIRE_HAS_AMX)

namespace quire {

constexpr int64_t kTileRows = 16;
constexpr int64_t kGroup = 2 * kTileRows;  // rows of x that are multiplied together
constexpr int64_t kLineBytes = 64;         // of a tile
constexpr int64_t kSumStride = kPanel * sizeof(float);
constexpr int64_t kMinAmxRows = 4;         // below, vectors are as fast
constexpr int64_t kSplitPrefetchBytes = 8192;

// The operand of ldtilecfg, palette 1.
struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t column_bytes[16] = {};
    uint8_t rows[16] = {};
};

// The tiles of the drawing for `rows` rows in each of A0 and A1.
QUIRE_INLINE void configure_tiles(int64_t rows) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
        config.column_bytes[tile] = kLineBytes;
        config.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : kTileRows);
    }
    _tile_loadconfig(&config);
}

QUIRE_INLINE void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

QUIRE_INLINE void store_sums(float* sums) {
    _tile_stored(0, sums, kSumStride);
    _tile_stored(1, sums + kTileColumns, kSumStride);
    _tile_stored(2, sums + kTileRows * kPanel, kSumStride);
    _tile_stored(3, sums + kTileRows * kPanel + kTileColumns, kSumStride);
}

// A finished block of sums that is rounded and stored while the tiles work on the next one.
struct PendingBlock {
    const float* sums = nullptr;  // [32][32]
    const PanelOutput* output = nullptr;
    int64_t row = 0, rows = 0;  // how many are still to be stored, from `row` on
    bool is_split = false;      // row i is the sum of rows i and 16 + i

    QUIRE_INLINE void store(const LinearArguments& a, int64_t count) {
        for (; count > 0 && rows > 0; --count, --rows, ++row, sums += kPanel) {
            Vec left = vec_load(sums), right = vec_load(sums + kVecWidth);
            if (is_split) {
                left = left + vec_load(sums + kTileRows * kPanel);
                right = right + vec_load(sums + kTileRows * kPanel + kVecWidth);
            }
            output->store_row(a, row, left, right);
        }
    }
};

QUIRE_INLINE void prefetch_step(const bf16* step) {
    for (int64_t i = 0; i < kStepSize; i += kLine) _mm_prefetch((const char*)(step + i), _MM_HINT_T1);
}

// 1 to 16 rows x one panel into sums[32][32], in two halves of K.
QUIRE_INLINE void multiply_split(const LinearArguments& a, const RowBlock<bf16>& x, const bf16* panel, float* sums,
                                 PendingBlock& pending) {
    const int64_t stride_bytes = x.stride * static_cast<int64_t>(sizeof(bf16));
    const int64_t steps = num_steps(a.k), half = steps / 2, rows_per_step = ceil_div(pending.rows, half + 1);
    constexpr int64_t kAhead = kSplitPrefetchBytes / sizeof(bf16);
    const bf16 *w0 = panel, *w1 = panel + half * kStepSize, *x0 = x.rows, *x1 = x.rows + half * kStep;
    zero_sums();
    for (int64_t step = 0; step < half; ++step, w0 += kStepSize, w1 += kStepSize, x0 += kStep, x1 += kStep) {
        prefetch_step(w0 + kAhead);
        _tile_loadd(4, x0, stride_bytes);
        _tile_stream_loadd(6, w0, kLineBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_stream_loadd(7, w0 + kTile, kLineBytes);
        _tile_dpbf16ps(1, 4, 7);
        prefetch_step(w1 + kAhead);
        _tile_loadd(5, x1, stride_bytes);
        _tile_stream_loadd(6, w1, kLineBytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_stream_loadd(7, w1 + kTile, kLineBytes);
        _tile_dpbf16ps(3, 5, 7);
        pending.store(a, rows_per_step);
    }
    if (steps % 2 != 0) {
        _tile_loadd(5, x1, stride_bytes);
        _tile_stream_loadd(6, w1, kLineBytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_stream_loadd(7, w1 + kTile, kLineBytes);
        _tile_dpbf16ps(3, 5, 7);
        pending.store(a, rows_per_step);
    }
    store_sums(sums);
}

// One packed group of rows x one panel into sums[32][32]. The panel stays in L1 from group to group, so the rows are
// read past L1. In each step a piece of `pending` is stored and `num_lines` lines of the weights from `next` on are
// asked for.
QUIRE_INLINE void multiply_group(const LinearArguments& a, const bf16* group, const bf16* panel, float* sums,
                                 PendingBlock& pending, const bf16* next, int64_t num_lines) {
    const int64_t steps = num_steps(a.k), rows_per_step = ceil_div(pending.rows, steps);
    zero_sums();
    for (int64_t step = 0; step < steps; ++step, panel += kStepSize, group += kStepSize) {
        for (int64_t i = 0; i < num_lines; ++i, next += kLine) _mm_prefetch((const char*)next, _MM_HINT_T1);
        _tile_loadd(6, panel, kLineBytes);
        _tile_stream_loadd(4, group, kLineBytes);
        _tile_stream_loadd(5, group + kTile, kLineBytes);
        _tile_loadd(7, panel + kTile, kLineBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
        pending.store(a, rows_per_step);
    }
    store_sums(sums);
}

// How many elements pack_groups writes for `rows` rows.
QUIRE_INLINE int64_t packed_groups_size(const LinearArguments& a, int64_t rows) {
    return ceil_div(rows, kGroup) * kGroup * padded_k(a.k);
}

// Rows [begin, end) of x as [groups of 32][steps][two A tiles], padded with zeros.
inline RowBlock<bf16> pack_groups(const LinearArguments& a, int64_t begin, int64_t end, bf16* target) {
    const int64_t group_size = num_steps(a.k) * kStepSize, padded_end = ceil_div(end - begin, kGroup) * kGroup;
    for (int64_t row = 0; row < padded_end; ++row) {
        const bf16* source = a.x + (begin + row) * a.stride_x;
        bf16* line = target + row / kGroup * group_size + row % kGroup * kLine;
        for (int64_t k = 0; k < a.k; k += kStep, line += kStepSize) {
            const int64_t count = begin + row >= end ? 0 : a.k - k;
            const __mmask32 mask = count >= kStep ? ~0u : (1u << count) - 1u;
            _mm512_store_si512(line, _mm512_maskz_loadu_epi16(mask, source + k));
        }
    }
    return {target, group_size, end - begin, begin};
}

// A block of at most 16 rows x the panels [begin, end).
inline void multiply_few_amx(const LinearArguments& a, const RowBlock<bf16>& x, Range panels) {
    alignas(64) float sums[2][kGroup * kPanel];
    PanelOutput outputs[2];
    PendingBlock pending;
    configure_tiles(x.count);
    for (int64_t panel = panels.begin, turn = 0; panel < panels.end; ++panel, turn ^= 1) {
        outputs[turn].open(a, panel, false);
        multiply_split(a, x, a.panel(panel), sums[turn], pending);
        pending.store(a, pending.rows);
        pending = {sums[turn], &outputs[turn], x.first_row, x.count, true};
    }
    pending.store(a, pending.rows);
    _tile_release();  // an unused tile state costs nothing at a context switch
}

// A block of packed groups x the panels [begin, end). While all groups meet one panel the next panel is fetched.
inline void multiply_groups_amx(const LinearArguments& a, const RowBlock<bf16>& x, Range panels, bool is_large) {
    alignas(64) float sums[2][kGroup * kPanel];
    PanelOutput outputs[2];
    PendingBlock pending;
    const int64_t groups = ceil_div(x.count, kGroup), num_lines = ceil_div(kStepSize / kLine, groups);
    configure_tiles(kTileRows);
    for (int64_t panel = panels.begin, turn = 0; panel < panels.end; ++panel) {
        PanelOutput* output = &outputs[panel % 2];
        output->open(a, panel, is_large);
        for (int64_t group = 0; group < groups; ++group, turn ^= 1) {
            const bf16* next = a.panel(panel + 1) + group * num_steps(a.k) * num_lines * kLine;
            multiply_group(a, x.rows + group * x.stride, a.panel(panel), sums[turn], pending, next, num_lines);
            pending.store(a, pending.rows);
            const int64_t row = group * kGroup, rows = x.count - row < kGroup ? x.count - row : kGroup;
            pending = {sums[turn], output, x.first_row + row, rows, false};
        }
    }
    pending.store(a, pending.rows);
    _tile_release();
}

}  // namespace quire

#endif
