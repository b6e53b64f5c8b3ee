// The product of attention_tile.h with AMX: 32 rows x two blocks of 16 queries in four tiles, 32 deep per step.
#pragma once

#include "attention_tile.h"

#if defined(QUIRE_HAS_AMX)

namespace quire {

// Holds the thread's tile registers, eight whole ones, while it lives.
class TileSession {
  public:
    TileSession() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        _tile_loadconfig(&config);
    }
    TileSession(const TileSession&) = delete;
    TileSession& operator=(const TileSession&) = delete;
    ~TileSession() { _tile_release(); }
};

// `rows` is a multiple of 32, `depth` of 32. Needs a TileSession.
template <int kBlocks>
void multiply_tiles(LeftTile<bf16> left, const bf16* right, int64_t right_stride, int64_t rows, int64_t depth,
                    bool is_added, float* sums, int64_t sums_stride) {
    const int64_t left_bytes = left.stride_row * static_cast<int64_t>(sizeof(bf16));
    for (int64_t row = 0; row < rows; row += 32) {
        float* upper = sums + row * 16;
        float* lower = upper + 256;
        if (is_added) {
            _tile_loadd(0, upper, 64);
            _tile_loadd(2, lower, 64);
            if (kBlocks == 2) {
                _tile_loadd(1, upper + sums_stride, 64);
                _tile_loadd(3, lower + sums_stride, 64);
            }
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        const bf16* source = left.data + row * left.stride_row;
        for (int64_t k = 0; k < depth; k += 32) {
            _tile_loadd(4, source + k, left_bytes);
            _tile_loadd(6, right + k * 16, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, source + 16 * left.stride_row + k, left_bytes);
            _tile_dpbf16ps(2, 5, 6);
            if (kBlocks == 2) {
                _tile_loadd(7, right + right_stride + k * 16, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, upper, 64);
        _tile_stored(2, lower, 64);
        if (kBlocks == 2) {
            _tile_stored(1, upper + sums_stride, 64);
            _tile_stored(3, lower + sums_stride, 64);
        }
    }
}

}  // namespace quire

#endif
