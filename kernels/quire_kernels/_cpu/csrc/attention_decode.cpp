// One query token against its keys: all query heads of one KV head together, so keys and values are read once, where
// they lie. Blocks lie scattered in memory, so the next stretch is prefetched while this one is worked on.
#include "attention_decode_amx.h"
#include "attention_decode_vector.h"

namespace quire {
namespace {

// Writes the offsets of the tile from position `begin`. Tiles end at multiples of 16, so all but the first are aligned.
void find_next_tile(const AttentionArguments& a, const Unit& unit, int64_t kv_head, int64_t begin, DecodeState& s) {
    const int64_t end = std::min(unit.kv_end, (begin + s.tile) / 16 * 16);
    s.next_count = std::max<int64_t>(end - begin, 0);
    if (s.next_count == 0) return;
    write_offsets(a, unit.seq, kv_head, begin, end, s.next_offsets);
    const int64_t padded = ceil_div(s.next_count, kVecWidth) * kVecWidth;
    std::fill(s.next_offsets + s.next_count, s.next_offsets + padded, s.next_offsets[s.next_count - 1]);
}

template <typename T>
void write_result(const AttentionArguments& a, const Unit& unit, int64_t first_head, float* partials,
                  const DecodeState& s) {
    const int64_t token = a.query_start_loc[unit.seq];
    for (int64_t g = 0; g < s.group_size; ++g) {
        const float* source = s.out + g * s.out_stride;
        if (unit.partial_row >= 0) {
            float* target = partials + (unit.partial_row + first_head + g) * partial_stride(a);
            std::copy_n(source, s.head_dim, target);
            target[s.head_dim] = s.maxima[g];
            target[s.head_dim + 1] = s.sums[g];
            continue;
        }
        T* target = static_cast<T*>(a.out) + (token * a.num_heads + first_head + g) * s.head_dim;
        const Vec inverse = vec_set(1.0f / s.sums[g]);
        for (int64_t d = 0; d < s.head_dim; d += kVecWidth) {
            const int64_t count = std::min<int64_t>(kVecWidth, s.head_dim - d);
            vec_store(target + d, vec_load(source + d) * inverse, count);
        }
    }
}

// Calls attend(begin) for the tile of s.count keys from position `begin`, for each tile of the unit.
template <typename Attend>
void for_each_tile(const AttentionArguments& a, const Unit& unit, int64_t kv_head, DecodeState& s, Attend attend) {
    find_next_tile(a, unit, kv_head, unit.kv_begin, s);
    for (int64_t begin = unit.kv_begin; begin < unit.kv_end; begin += s.count) {
        std::swap(s.offsets, s.next_offsets);
        s.count = s.next_count;
        find_next_tile(a, unit, kv_head, begin + s.count, s);
        attend(begin);
    }
}

}  // namespace

template <typename T>
void attend_decode(const AttentionArguments& a, const Unit& unit, int64_t kv_head, float* partials) {
    static thread_local Arena arena;
    const int64_t first_head = kv_head * a.group_size(), position = a.seq_lens[unit.seq] - 1;
    const T* query = static_cast<const T*>(a.query) + a.query_start_loc[unit.seq] * a.query_stride_token +
                     first_head * a.query_stride_head;
    const T* keys = static_cast<const T*>(a.key_cache);
    const T* values = static_cast<const T*>(a.value_cache);
#if defined(QUIRE_HAS_AMX)
    if constexpr (std::is_same_v<T, bf16>) {
        arena.reserve(DecodeState::size_bytes(a) + DecodeTiles::size_bytes(a));
        DecodeState s(a, sizeof(T), arena);
        DecodeTiles tiles(a, query, s, arena);
        for_each_tile(a, unit, kv_head, s, [&](int64_t begin) {
            tiles.score(a, first_head, begin, position, s);
            for (int64_t g = 0; g < s.group_size; ++g) update_softmax(g, s, tiles.weights_of(g, s));
            tiles.add_values(a, s);
        });
        tiles.write_out(s);
        write_result<T>(a, unit, first_head, partials, s);
        return;
    }
#endif
    arena.reserve(DecodeState::size_bytes(a));
    DecodeState s(a, sizeof(T), arena);
    for_each_tile(a, unit, kv_head, s, [&](int64_t begin) {
        score_tile(a, query, first_head, begin - position, s);
        for (int64_t g = 0; g < s.group_size; ++g) update_softmax(g, s, s.scores + g * kDecodeTile);
        add_value_tile(values, keys, s);
    });
    write_result<T>(a, unit, first_head, partials, s);
}

template void attend_decode<float>(const AttentionArguments&, const Unit&, int64_t, float*);
template void attend_decode<bf16>(const AttentionArguments&, const Unit&, int64_t, float*);

}  // namespace quire
