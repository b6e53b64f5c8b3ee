// What the two decode kernels (attention_decode_vector.h, attention_decode_amx.h) share: the state of one unit for one
// KV head, and the online softmax.
#pragma once

#include "attention.h"

#include <algorithm>

namespace quire {

constexpr int64_t kDecodeTile = 128;        // most keys per step of the online softmax
constexpr int64_t kDecodeTileBytes = 8192;  // of keys, and as much of values

// Where a kernel stands. scores, maxima, sums and rescale are per query head of the group.
struct DecodeState {
    int64_t group_size, head_dim, tile;
    float* scores;                   // [group_size][kDecodeTile]
    float *maxima, *sums, *rescale;  // [group_size]
    float* out;                      // [group_size][out_stride], not yet divided by sums
    int64_t out_stride;
    int64_t *offsets, *next_offsets;  // of this tile's keys and of the next one's, padded to whole vectors
    int64_t count, next_count;

    static size_t size_bytes(const AttentionArguments& a) {
        const int64_t group_size = a.group_size();
        return Arena::size_of<float>(group_size * kDecodeTile) + 3 * Arena::size_of<float>(group_size) +
               Arena::size_of<float>(group_size * padded_dim(a)) + 2 * Arena::size_of<int64_t>(kDecodeTile);
    }
    static int64_t padded_dim(const AttentionArguments& a) { return ceil_div(a.head_dim, 32) * 32; }

    DecodeState(const AttentionArguments& a, int64_t item_size, Arena& arena)
        : group_size(a.group_size()), head_dim(a.head_dim), out_stride(padded_dim(a)), count(0), next_count(0) {
        tile = std::clamp<int64_t>(kDecodeTileBytes / (head_dim * item_size) / 32 * 32, 32, kDecodeTile);
        scores = arena.take<float>(group_size * kDecodeTile);
        maxima = arena.take<float>(group_size);
        sums = arena.take<float>(group_size);
        rescale = arena.take<float>(group_size);
        out = arena.take<float>(group_size * out_stride);
        offsets = arena.take<int64_t>(kDecodeTile);
        next_offsets = arena.take<int64_t>(kDecodeTile);
        std::fill_n(out, group_size * out_stride, 0.0f);
        std::fill_n(maxima, group_size, kHidden);
        std::fill_n(sums, group_size, 0.0f);
    }
};

template <typename T>
QUIRE_INLINE void prefetch_row(const T* row, int64_t head_dim) {
    const char* begin = reinterpret_cast<const char*>(row);
    for (int64_t i = 0; i < head_dim * static_cast<int64_t>(sizeof(T)); i += 64) _mm_prefetch(begin + i, _MM_HINT_T1);
}

// Turns kVecWidth dot products of head `head` into scores. `distance` is the first key's position minus the query's;
// keys from `count` on are hidden.
QUIRE_INLINE Vec finish_scores(const AttentionArguments& a, const ScoreRule& rule, Vec dots, int64_t head,
                               int64_t distance, int64_t count) {
    alignas(64) static constexpr float kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Vec scores = rule.apply(dots);
    if (a.alibi_slopes != nullptr) {
        const Vec distances = vec_load(kLane) + vec_set(static_cast<float>(distance));
        scores = vec_fma(vec_set(a.alibi_slopes[head] * kLog2E), distances, scores);
    }
    return count < kVecWidth ? vec_keep(scores, count, vec_set(-kInfinity)) : scores;
}

// Turns the scores of head `g` into weights (in place when W is float), and updates its maximum, its sum and the factor
// for its output so far.
template <typename W>
void update_softmax(int64_t g, DecodeState& s, W* weights) {
    const float* scores = s.scores + g * kDecodeTile;
    Vec highest = vec_load(scores);
    for (int64_t t = kVecWidth; t < s.count; t += kVecWidth) highest = vec_max(highest, vec_load(scores + t));
    const float maximum = std::max(s.maxima[g], reduce_max(highest));
    const Vec shift = vec_set(maximum);
    constexpr int kDegree = sizeof(W) == sizeof(float) ? 5 : 3;
    Vec sum = vec_zero();
    for (int64_t t = 0; t < s.count; t += kVecWidth) {
        const Vec weight = vec_exp2<kDegree>(vec_load(scores + t) - shift);
        vec_store(weights + t, weight);
        sum = sum + weight;
    }
    s.rescale[g] = __builtin_exp2f(s.maxima[g] - maximum);
    s.sums[g] = s.sums[g] * s.rescale[g] + reduce_add(sum);
    s.maxima[g] = maximum;
}

}  // namespace quire
