// Paged attention: what its translation units share.
//
//   attention.cpp          checks indices, cuts the batch into items, runs them on all threads, combines what was split
//   attention_decode.cpp   one query token: keys and values are streamed from the cache once, for all heads of a group
//   attention_prefill.cpp  many query tokens: lanes are queries, keys and values are packed into tiles and multiplied
//
// Scores live in base 2 (multiplied by log2 e), softmax runs online, and all sums are float32.
#pragma once

#include "common.h"
#include "vec_math.h"

#include <new>

namespace quire {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kHidden = -1e30f;  // the score of a key that a query does not see: finite, so differences are no NaN

// Packed by attention.py: eight bytes a field, in this order.
struct AttentionArguments {
    const void *query, *key_cache, *value_cache;
    void* out;  // [num_tokens][num_heads][head_dim]
    const int32_t *block_table, *query_start_loc, *seq_lens;
    const float* alibi_slopes;  // or null
    int64_t num_tokens, num_seqs, num_heads, num_kv_heads, head_dim, num_blocks, block_size, max_blocks_per_seq;
    int64_t query_stride_token, query_stride_head;
    int64_t cache_stride_block, cache_stride_slot, cache_stride_head;  // of both caches
    int64_t sliding_window;                                            // 0: none
    double scale, soft_cap;                                            // soft_cap 0: none

    int64_t group_size() const { return num_heads / num_kv_heads; }
    // The first key position that the query at `position` sees.
    int64_t first_visible(int64_t position) const {
        return sliding_window > 0 && position >= sliding_window ? position - sliding_window + 1 : 0;
    }
};

// A stretch of one sequence's queries against a stretch of its keys; runs once for each KV head.
struct Unit {
    int64_t seq, query_begin, query_count;  // queries relative to the sequence's first of this step
    int64_t kv_begin, kv_end;
    int64_t partial_row;  // first row in the buffer of partial results; -1: it sees all keys and writes the output
    int64_t cost;
};

// A partial result: head_dim unnormalised sums, then the maximum and the sum of weights.
QUIRE_INLINE int64_t partial_stride(const AttentionArguments& a) { return a.head_dim + 2; }

// Memory of one thread that only grows; contents are undefined after `reserve`.
class Arena {
  public:
    Arena() = default;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    ~Arena() { ::operator delete(data_, std::align_val_t(64)); }

    void reserve(size_t size_bytes) {
        if (size_bytes > capacity_) {
            ::operator delete(data_, std::align_val_t(64));
            data_ = static_cast<char*>(::operator new(size_bytes, std::align_val_t(64)));
            capacity_ = size_bytes;
        }
        used_ = 0;
    }
    // The next `count` elements, on a cache line of their own. The sizes taken are to sum up to what was reserved.
    template <typename T>
    T* take(int64_t count) {
        T* result = reinterpret_cast<T*>(data_ + used_);
        used_ += size_of<T>(count);
        return result;
    }
    template <typename T>
    static size_t size_of(int64_t count) {
        return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    }

  private:
    char* data_ = nullptr;
    size_t capacity_ = 0, used_ = 0;
};

// Turns dot products into scores in base 2.
class ScoreRule {
  public:
    explicit ScoreRule(const AttentionArguments& a)
        : has_cap_(a.soft_cap > 0.0),
          inner_(static_cast<float>(has_cap_ ? 2.0 * a.scale / a.soft_cap * kLog2E : a.scale * kLog2E)),
          cap_(static_cast<float>(a.soft_cap * kLog2E)) {}

    bool has_cap() const { return has_cap_; }
    float factor() const { return inner_; }  // without a cap: all that the rule does
    QUIRE_INLINE Vec apply(Vec dot) const;

  private:
    bool has_cap_;
    float inner_, cap_;
};

// cap * tanh(dot * scale / cap), with tanh(x) = 1 - 2 / (e^2x + 1).
QUIRE_INLINE Vec ScoreRule::apply(Vec dot) const {
    const Vec scaled = dot * vec_set(inner_);
    if (!has_cap_) return scaled;
    const Vec cap = vec_set(cap_);
    return cap - (cap + cap) / (vec_exp2<5>(vec_min(vec_set(126.0f), scaled)) + vec_set(1.0f));
}

// Writes where each position in [begin, end) lies, in elements from the cache's start, for KV head `kv_head`.
inline void write_offsets(const AttentionArguments& a, int64_t seq, int64_t kv_head, int64_t begin, int64_t end,
                          int64_t* offsets) {
    const int32_t* table = a.block_table + seq * a.max_blocks_per_seq;
    for (int64_t position = begin; position < end;) {
        const int64_t slot = position % a.block_size;
        const int64_t block_end = position - slot + a.block_size;
        const int64_t run_end = block_end < end ? block_end : end;
        int64_t offset = table[position / a.block_size] * a.cache_stride_block + slot * a.cache_stride_slot +
                         kv_head * a.cache_stride_head;
        for (; position < run_end; ++position, offset += a.cache_stride_slot) *offsets++ = offset;
    }
}

// Run one unit for one KV head. `partials` is the buffer that unit.partial_row points into.
template <typename T>
void attend_decode(const AttentionArguments& a, const Unit& unit, int64_t kv_head, float* partials);
template <typename T>
void attend_prefill(const AttentionArguments& a, const Unit& unit, int64_t kv_head, float* partials);

// Query tokens that a prefill unit takes: enough rows to pay for packing keys and values, few enough for the cache.
QUIRE_INLINE int64_t prefill_tile_tokens(const AttentionArguments& a) {
    constexpr int64_t kRows = 192;
    return kRows / a.group_size() > 1 ? kRows / a.group_size() : 1;
}

}  // namespace quire
