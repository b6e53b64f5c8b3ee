// Weights into the packed layout (linear_layout.h), and single rows back out of it.
#include "linear_layout.h"

namespace quire {
namespace {

// A pair of neighbours in k travels as one 32-bit word: packing is a transpose of words.
using Word = uint32_t;

QUIRE_INLINE Word load_word(const bf16* p) {
    Word word;
    std::memcpy(&word, p, sizeof(word));
    return word;
}

// Where the pair (column, k) of a panel lies, in words; k is even.
QUIRE_INLINE int64_t word_at(int64_t column, int64_t k) {
    const int64_t tile = k / kStep * 2 + column / kTileColumns;
    return (tile * (kStep / 2) + k % kStep / 2) * kTileColumns + column % kTileColumns;
}

QUIRE_INLINE int64_t words_per_panel(int64_t k) { return num_steps(k) * kStepSize / 2; }

// target[c][r] = source[r][c] for 8 x 8 words.
QUIRE_INLINE void transpose_8x8(const bf16* source, int64_t stride, Word* target) {
    __m256i row[8], pair[8], quad[8];
    for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_si256((const __m256i*)(source + i * stride));
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_epi32(row[i], row[i + 1]);
        pair[i + 1] = _mm256_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        quad[i] = _mm256_unpacklo_epi64(pair[i], pair[i + 2]);
        quad[i + 1] = _mm256_unpackhi_epi64(pair[i], pair[i + 2]);
        quad[i + 2] = _mm256_unpacklo_epi64(pair[i + 1], pair[i + 3]);
        quad[i + 3] = _mm256_unpackhi_epi64(pair[i + 1], pair[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        const __m256i low = _mm256_permute2x128_si256(quad[i], quad[i + 4], 0x20);
        const __m256i high = _mm256_permute2x128_si256(quad[i], quad[i + 4], 0x31);
        _mm256_storeu_si256((__m256i*)(target + i * kTileColumns), low);
        _mm256_storeu_si256((__m256i*)(target + (i + 4) * kTileColumns), high);
    }
}

// `count` rows of the weight become columns `column...` of a panel; k from `begin` (even) on, one word at a time.
void pack_rows(const bf16* rows, int64_t stride, int64_t count, int64_t begin, int64_t k, Word* panel, int64_t column) {
    for (int64_t i = 0; i < count; ++i) {
        const bf16* row = rows + i * stride;
        int64_t at = begin;
        for (; at + 2 <= k; at += 2) panel[word_at(column + i, at)] = load_word(row + at);
        if (at < k) panel[word_at(column + i, at)] = row[at].bits, at += 2;
        for (; at < padded_k(k); at += 2) panel[word_at(column + i, at)] = 0;
    }
}

void pack_whole_panel(const bf16* rows, int64_t stride, int64_t k, Word* panel) {
    const int64_t whole = k / 16 * 16;
    for (int64_t at = 0; at < whole; at += 16) {
        for (int64_t column = 0; column < kPanel; column += 8) {
            transpose_8x8(rows + column * stride + at, stride, panel + word_at(column, at));
        }
    }
    if (whole < padded_k(k)) pack_rows(rows, stride, kPanel, whole, k, panel, 0);
}

}  // namespace
}  // namespace quire

using namespace quire;

// Packs weight[num_rows][k] (row stride `stride`) as the output features [first_row, first_row + num_rows) of `packed`.
// Parts of one packed weight may be given one after the other.
QUIRE_EXPORT void quire_linear_pack_bf16(const bf16* weight, int64_t stride, int64_t num_rows, int64_t k,
                                         int64_t first_row, bf16* packed) {
    const int64_t end_row = first_row + num_rows;
    const int64_t first_panel = first_row / kPanel, end_panel = num_panels(end_row);
#pragma omp parallel for schedule(static) if (num_rows * k > 65536)
    for (int64_t p = first_panel; p < end_panel; ++p) {
        Word* panel = (Word*)packed + p * words_per_panel(k);
        const int64_t begin = p * kPanel < first_row ? first_row : p * kPanel;
        const int64_t end = (p + 1) * kPanel > end_row ? end_row : (p + 1) * kPanel;
        const bf16* rows = weight + (begin - first_row) * stride;
        if (end - begin == kPanel) pack_whole_panel(rows, stride, k, panel);
        else pack_rows(rows, stride, end - begin, 0, k, panel, begin - p * kPanel);
    }
}

// out[i][:] = row ids[i] of the weight that was packed. Returns 0, or 1 + the index of the first id outside [0, n).
QUIRE_EXPORT int64_t quire_linear_gather_bf16(const bf16* packed, int64_t n, int64_t k, const int64_t* ids,
                                              int64_t num_ids, bf16* out) {
    for (int64_t i = 0; i < num_ids; ++i) {
        if (ids[i] < 0 || ids[i] >= n) return 1 + i;
    }
#pragma omp parallel for schedule(static) if (num_ids * k > 16384)
    for (int64_t i = 0; i < num_ids; ++i) {
        const Word* panel = (const Word*)packed + ids[i] / kPanel * words_per_panel(k);
        const int64_t column = ids[i] % kPanel;
        bf16* target = out + i * k;
        for (int64_t at = 0; at + 2 <= k; at += 2) std::memcpy(target + at, panel + word_at(column, at), sizeof(Word));
        if (k % 2) target[k - 1].bits = static_cast<uint16_t>(panel[word_at(column, k - 1)]);
    }
    return 0;
}
