// Paged attention: plan and run. See attention.h for the parts.
//
// A sequence is cut into units by its own lengths alone (decode: at multiples of kDecodePartition; prefill: by query
// tiles, and a lone tile with a long context at multiples of kPrefillPartition), so its result does not depend on its
// neighbours or on the number of threads. Units times KV heads are then dealt out in chunks of about equal cost.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <vector>

namespace quire {
namespace {

constexpr int64_t kDecodePartition = 512;
constexpr int64_t kPrefillPartition = 2048;
constexpr int64_t kChunksPerThread = 4;
constexpr int64_t kMinParallelCost = 40000;

// What the caller is told (attention.py words it).
enum Status : int64_t { kOk = 0, kBadQueryStartLoc = 1, kBadSeqLens = 2, kBadBlockTable = 3 };

struct Split {
    int64_t seq, query_len, num_parts, partial_row;
};

struct Plan {
    std::vector<Unit> units;
    std::vector<Split> splits;
    std::vector<int64_t> chunk_begins;  // in items: unit * num_kv_heads + kv_head
    int64_t num_partial_rows = 0, cost = 0;
};

Status check(const AttentionArguments& a) {
    if (a.query_start_loc[0] != 0 || a.query_start_loc[a.num_seqs] != a.num_tokens) return kBadQueryStartLoc;
    const uint32_t num_blocks = static_cast<uint32_t>(a.num_blocks);
    for (int64_t seq = 0; seq < a.num_seqs; ++seq) {
        const int64_t query_len = static_cast<int64_t>(a.query_start_loc[seq + 1]) - a.query_start_loc[seq];
        const int64_t seq_len = a.seq_lens[seq];
        if (query_len < 0) return kBadQueryStartLoc;
        if (query_len == 0) continue;
        if (seq_len < query_len || seq_len > a.max_blocks_per_seq * a.block_size) return kBadSeqLens;
        const int32_t* table = a.block_table + seq * a.max_blocks_per_seq;
        const int64_t end = ceil_div(seq_len, a.block_size);
        uint32_t highest = 0;
        for (int64_t i = a.first_visible(seq_len - query_len) / a.block_size; i < end; ++i) {
            highest = std::max(highest, static_cast<uint32_t>(table[i]));
        }
        if (highest >= num_blocks) return kBadBlockTable;
    }
    return kOk;
}

// Adds the units of queries [begin, begin + count) against their keys, cut at multiples of `partition`.
void add_units(const AttentionArguments& a, int64_t seq, int64_t begin, int64_t count, int64_t partition, Plan& plan) {
    const int64_t query_len = a.query_start_loc[seq + 1] - a.query_start_loc[seq];
    const int64_t context_len = a.seq_lens[seq] - query_len;
    const int64_t kv_begin = a.first_visible(context_len + begin), kv_end = context_len + begin + count;
    const int64_t first_part = kv_begin / partition, num_parts = ceil_div(kv_end, partition) - first_part;
    const int64_t rows = query_len * a.num_heads;
    const bool is_split = num_parts > 1;
    if (is_split) plan.splits.push_back({seq, query_len, num_parts, plan.num_partial_rows});
    // Decode is bound by reading keys and values, prefill by its rows.
    const int64_t cost_per_key = a.head_dim * (query_len == 1 ? 1 : 1 + count * a.group_size() / 16);
    for (int64_t part = first_part; part < first_part + num_parts; ++part) {
        const int64_t part_begin = std::max(kv_begin, part * partition);
        const int64_t part_end = std::min(kv_end, (part + 1) * partition);
        const int64_t cost = (part_end - part_begin) * cost_per_key + 500;
        plan.units.push_back({seq, begin, count, part_begin, part_end, is_split ? plan.num_partial_rows : -1, cost});
        plan.cost += cost * a.num_kv_heads;
        if (is_split) plan.num_partial_rows += rows;
    }
}

void build_plan(const AttentionArguments& a, Plan& plan) {
    plan.units.clear();
    plan.splits.clear();
    plan.num_partial_rows = plan.cost = 0;
    const int64_t tile = prefill_tile_tokens(a);
    for (int64_t seq = 0; seq < a.num_seqs; ++seq) {
        const int64_t query_len = a.query_start_loc[seq + 1] - a.query_start_loc[seq];
        const int64_t partition = query_len == 1 ? kDecodePartition : query_len <= tile ? kPrefillPartition : INT32_MAX;
        for (int64_t begin = 0; begin < query_len; begin += tile) {
            add_units(a, seq, begin, std::min(tile, query_len - begin), partition, plan);
        }
    }
}

// Cuts the items where the running cost passes each chunk's share.
void cut_chunks(const AttentionArguments& a, int64_t num_chunks, Plan& plan) {
    plan.chunk_begins.clear();
    int64_t before = 0, item = 0;
    for (const Unit& unit : plan.units) {
        for (int64_t head = 0; head < a.num_kv_heads; ++head, ++item, before += unit.cost) {
            const int64_t chunk = static_cast<int64_t>(plan.chunk_begins.size());
            if (before * num_chunks >= chunk * plan.cost) plan.chunk_begins.push_back(item);
        }
    }
    plan.chunk_begins.push_back(item);
}

template <typename T>
void run_item(const AttentionArguments& a, const Plan& plan, int64_t item, float* partials) {
    const Unit& unit = plan.units[static_cast<size_t>(item / a.num_kv_heads)];
    const int64_t kv_head = item % a.num_kv_heads;
    const bool is_decode = a.query_start_loc[unit.seq + 1] - a.query_start_loc[unit.seq] == 1;
    if (is_decode) attend_decode<T>(a, unit, kv_head, partials);
    else attend_prefill<T>(a, unit, kv_head, partials);
}

// Weighs the parts of row `row` (query * num_heads + head) of a split sequence by their maxima and writes the output.
template <typename T>
void combine_row(const AttentionArguments& a, const Split& split, int64_t row, const float* partials) {
    const int64_t stride = partial_stride(a), rows = split.query_len * a.num_heads;
    const auto part = [&](int64_t index) { return partials + (split.partial_row + index * rows + row) * stride; };
    float maximum = kHidden;
    for (int64_t i = 0; i < split.num_parts; ++i) maximum = std::max(maximum, part(i)[a.head_dim]);
    float total = 0.0f;
    for (int64_t i = 0; i < split.num_parts; ++i) {
        total += __builtin_exp2f(part(i)[a.head_dim] - maximum) * part(i)[a.head_dim + 1];
    }
    T* out = static_cast<T*>(a.out) + a.query_start_loc[split.seq] * a.num_heads * a.head_dim + row * a.head_dim;
    for (int64_t d = 0; d < a.head_dim; d += kVecWidth) {
        const int64_t count = std::min<int64_t>(kVecWidth, a.head_dim - d);
        Vec sum = vec_zero();
        for (int64_t i = 0; i < split.num_parts; ++i) {
            const float weight = __builtin_exp2f(part(i)[a.head_dim] - maximum) / total;
            sum = vec_fma(vec_load(part(i) + d, count), vec_set(weight), sum);
        }
        vec_store(out + d, sum, count);
    }
}

template <typename T>
void run_plan(const AttentionArguments& a, Plan& plan, float* partials) {
    const int64_t num_items = static_cast<int64_t>(plan.units.size()) * a.num_kv_heads;
    const int64_t max_threads = omp_get_max_threads();
    const int64_t num_threads = plan.cost < kMinParallelCost ? 1 : std::min(max_threads, num_items);
    cut_chunks(a, num_threads == 1 ? 1 : num_threads * kChunksPerThread, plan);
    const int64_t num_chunks = static_cast<int64_t>(plan.chunk_begins.size()) - 1;
    std::atomic<int64_t> next_chunk{0};
#pragma omp parallel num_threads(static_cast<int>(num_threads)) if (num_threads > 1)
    {
        int64_t chunk;
        while ((chunk = next_chunk.fetch_add(1, std::memory_order_relaxed)) < num_chunks) {
            const int64_t end = plan.chunk_begins[static_cast<size_t>(chunk) + 1];
            for (int64_t item = plan.chunk_begins[static_cast<size_t>(chunk)]; item < end; ++item) {
                run_item<T>(a, plan, item, partials);
            }
        }
        if (!plan.splits.empty()) {
#pragma omp barrier
            for (const Split& split : plan.splits) {
#pragma omp for schedule(static) nowait
                for (int64_t row = 0; row < split.query_len * a.num_heads; ++row) {
                    combine_row<T>(a, split, row, partials);
                }
            }
        }
    }
}

template <typename T>
int64_t paged_attention(const AttentionArguments& a) {
    const Status status = check(a);
    if (status != kOk) return status;
    static thread_local Plan plan;
    static thread_local Arena arena;
    build_plan(a, plan);
    if (plan.units.empty()) return kOk;
    const int64_t partial_floats = plan.num_partial_rows * partial_stride(a);
    arena.reserve(Arena::size_of<float>(partial_floats));
    run_plan<T>(a, plan, arena.take<float>(partial_floats));
    return kOk;
}

}  // namespace
}  // namespace quire

QUIRE_EXPORT int64_t quire_paged_attention_f32(const quire::AttentionArguments* a) {
    return quire::paged_attention<float>(*a);
}
QUIRE_EXPORT int64_t quire_paged_attention_bf16(const quire::AttentionArguments* a) {
    return quire::paged_attention<quire::bf16>(*a);
}
