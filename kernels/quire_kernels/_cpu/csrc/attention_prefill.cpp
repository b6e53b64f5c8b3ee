// Many query tokens against their keys: query rows (token, head of the group) in blocks of kVecWidth lanes, keys and
// values packed tile by tile and used by all blocks. The products are in attention_tile.h.
#include "attention_amx.h"
#include "attention_tile.h"

#include <algorithm>

namespace quire {
namespace {

constexpr int64_t kKeyTile = 128;  // keys packed at a time, a multiple of 32

template <typename T>
struct State {
    using E = TileElement<T>;
    int64_t group_size, head_dim, padded_dim, num_rows, num_blocks;
    int64_t first_position;             // of the unit's first query
    float *out, *maxima, *sums;         // [num_blocks][padded_dim][kVecWidth], [num_blocks][kVecWidth] twice
    float *positions, *slopes;          // [num_blocks][kVecWidth]
    float* scores;                      // [2][kKeyTile][kVecWidth]
    E *queries, *weights;               // right operands, for num_blocks and for two blocks
    E *keys, *values;                   // left operands
    int64_t* offsets;

    int64_t block_elements() const { return padded_dim * kVecWidth; }
};

template <typename T>
State<T> reserve_state(const AttentionArguments& a, const Unit& unit, Arena& arena) {
    using E = TileElement<T>;
    State<T> s{};
    s.group_size = a.group_size();
    s.head_dim = a.head_dim;
    s.padded_dim = ceil_div(a.head_dim, kDepthMultiple) * kDepthMultiple;
    s.num_rows = unit.query_count * s.group_size;
    s.num_blocks = ceil_div(s.num_rows, kVecWidth);
    s.first_position = a.seq_lens[unit.seq] - (a.query_start_loc[unit.seq + 1] - a.query_start_loc[unit.seq]) +
                       unit.query_begin;
    const int64_t lanes_in_all = s.num_blocks * kVecWidth, out_size = s.num_blocks * s.block_elements();
    arena.reserve(Arena::size_of<float>(out_size) + 4 * Arena::size_of<float>(lanes_in_all) +
                  Arena::size_of<float>(2 * kKeyTile * kVecWidth) + Arena::size_of<E>(out_size) +
                  2 * Arena::size_of<E>(kKeyTile * s.padded_dim) + Arena::size_of<E>(2 * kKeyTile * kVecWidth) +
                  Arena::size_of<int64_t>(kKeyTile));
    s.out = arena.take<float>(out_size);
    s.maxima = arena.take<float>(lanes_in_all);
    s.sums = arena.take<float>(lanes_in_all);
    s.positions = arena.take<float>(lanes_in_all);
    s.slopes = arena.take<float>(lanes_in_all);
    s.scores = arena.take<float>(2 * kKeyTile * kVecWidth);
    s.queries = arena.take<E>(out_size);
    s.keys = arena.take<E>(kKeyTile * s.padded_dim);
    s.values = arena.take<E>(kKeyTile * s.padded_dim);
    s.weights = arena.take<E>(2 * kKeyTile * kVecWidth);
    s.offsets = arena.take<int64_t>(kKeyTile);
    std::fill_n(s.out, out_size, 0.0f);
    std::fill_n(s.maxima, lanes_in_all, kHidden);
    std::fill_n(s.sums, lanes_in_all, 0.0f);
    return s;
}

// Packs the queries; lanes past the last row repeat it and are never written out.
template <typename T>
void load_queries(const AttentionArguments& a, const Unit& unit, int64_t kv_head, State<T>& s) {
    const T* query = static_cast<const T*>(a.query) +
                     (a.query_start_loc[unit.seq] + unit.query_begin) * a.query_stride_token +
                     kv_head * s.group_size * a.query_stride_head;
    for (int64_t block = 0; block < s.num_blocks; ++block) {
        const T* rows[kVecWidth];
        for (int64_t lane = 0; lane < kVecWidth; ++lane) {
            const int64_t row = std::min(block * kVecWidth + lane, s.num_rows - 1);
            const int64_t token = row / s.group_size, head = row % s.group_size;
            rows[lane] = query + token * a.query_stride_token + head * a.query_stride_head;
            s.positions[block * kVecWidth + lane] = static_cast<float>(s.first_position + token);
            if (a.alibi_slopes != nullptr) {
                s.slopes[block * kVecWidth + lane] = a.alibi_slopes[kv_head * s.group_size + head] * kLog2E;
            }
        }
        pack_queries(rows, s.head_dim, s.padded_dim, s.queries + block * s.block_elements());
    }
}

QUIRE_INLINE void store_weights(float* target, int64_t t, Vec first, Vec second) {
    vec_store(target + t * kVecWidth, first);
    vec_store(target + (t + 1) * kVecWidth, second);
}

#if defined(QUIRE_HAS_AVX512)
// Pairs of keys side by side; weights are positive, so adding half a unit rounds them.
QUIRE_INLINE void store_weights(bf16* target, int64_t t, Vec first, Vec second) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(first.v), half), 16);
    const __m512i high = _mm512_add_epi32(_mm512_castps_si512(second.v), half);
    _mm512_storeu_si512(target + t * kVecWidth, _mm512_mask_blend_epi16(0xaaaaaaaau, low, high));
}
#endif

struct KeyTile {
    int64_t begin, count;
};

// Applies the score rule, alibi and visibility to scores[count][kVecWidth]; keys past the tile's end are hidden.
template <typename T>
void finish_scores(const AttentionArguments& a, const ScoreRule& rule, int64_t block, KeyTile tile, int64_t count,
                   const State<T>& s, float* scores) {
    const Vec positions = vec_load(s.positions + block * kVecWidth), hidden = vec_set(kHidden);
    const bool has_alibi = a.alibi_slopes != nullptr;
    const Vec slopes = has_alibi ? vec_load(s.slopes + block * kVecWidth) : vec_zero();
    const float window = a.sliding_window > 0 ? static_cast<float>(a.sliding_window) : kInfinity;
    const Vec first_seen = positions - vec_set(window);  // exclusive
    const int64_t num_keys = std::min(count, tile.count);
    std::fill(scores + num_keys * kVecWidth, scores + count * kVecWidth, kHidden);
    for (int64_t t = 0; t < num_keys; ++t) {
        const Vec key = vec_set(static_cast<float>(tile.begin + t));
        Vec score = rule.apply(vec_load(scores + t * kVecWidth));
        if (has_alibi) score = vec_fma(slopes, key - positions, score);
        score = select_less(positions, key, hidden, score);
        score = select_less(first_seen, key, score, hidden);
        vec_store(scores + t * kVecWidth, score);
    }
}

// Online softmax of one block: turns scores * factor into weights (rounded to the tile's type; their sum is of the
// exact ones), and rescales the block's output when its maximum rose.
template <typename T>
void softmax_block(int64_t block, int64_t count, float factor, const float* scores, TileElement<T>* weights,
                   State<T>& s) {
    float* maxima = s.maxima + block * kVecWidth;
    float* sums = s.sums + block * kVecWidth;
    const Vec scale = vec_set(factor), before = vec_load(maxima);
    Vec even = vec_load(scores), odd = vec_load(scores + kVecWidth);
    for (int64_t t = 2; t < count; t += 2) {
        even = vec_max(even, vec_load(scores + t * kVecWidth));
        odd = vec_max(odd, vec_load(scores + (t + 1) * kVecWidth));
    }
    const Vec maximum = vec_max(before, vec_max(even, odd) * scale);
    const Vec shift = vec_zero() - maximum;
    constexpr int kDegree = kIsPaired<T> ? 3 : 5;
    Vec sum = vec_zero(), other_sum = vec_zero();
    for (int64_t t = 0; t < count; t += 2) {
        const Vec first = vec_exp2<kDegree>(vec_fma(vec_load(scores + t * kVecWidth), scale, shift));
        const Vec second = vec_exp2<kDegree>(vec_fma(vec_load(scores + (t + 1) * kVecWidth), scale, shift));
        sum = sum + first;
        other_sum = other_sum + second;
        store_weights(weights, t, first, second);
    }
    const Vec rescale = vec_exp2<5>(before - maximum);
    vec_store(sums, vec_fma(vec_load(sums), rescale, sum + other_sum));
    vec_store(maxima, maximum);
    constexpr uint32_t kAllLanes = static_cast<uint32_t>((uint64_t{1} << kVecWidth) - 1);
    if (mask_ge(before, maximum) == kAllLanes) return;
    float* out = s.out + block * s.block_elements();
    for (int64_t i = 0; i < s.block_elements(); i += kVecWidth) vec_store(out + i, vec_load(out + i) * rescale);
}

template <int kBlocks, typename E>
void multiply(LeftTile<E> left, const E* right, int64_t right_stride, int64_t rows, int64_t depth, bool is_added,
              float* sums, int64_t sums_stride) {
#if defined(QUIRE_HAS_AMX)
    if constexpr (std::is_same_v<E, bf16>) {
        multiply_tiles<kBlocks>(left, right, right_stride, rows, depth, is_added, sums, sums_stride);
        return;
    }
#endif
    multiply_vectors<kBlocks>(left, right, right_stride, rows, depth, is_added, sums, sums_stride);
}

// One tile of keys for kBlocks blocks of queries from `block`.
template <typename T, int kBlocks>
void attend_blocks(const AttentionArguments& a, const ScoreRule& rule, KeyTile tile,
                   LeftTile<TileElement<T>> keys, LeftTile<TileElement<T>> values, int64_t block, State<T>& s) {
    const int64_t last_row = std::min((block + kBlocks) * kVecWidth, s.num_rows) - 1;
    const int64_t first_position = s.first_position + block * kVecWidth / s.group_size;
    const int64_t last_position = s.first_position + last_row / s.group_size;
    const int64_t seen = std::min(tile.count, last_position + 1 - tile.begin);
    if (seen <= 0 || tile.begin + tile.count <= a.first_visible(first_position)) return;
    const int64_t count = ceil_div(seen, 32) * 32;
    constexpr int64_t kScoresStride = kKeyTile * kVecWidth;
    multiply<kBlocks>(keys, s.queries + block * s.block_elements(), s.block_elements(), count, s.padded_dim, false,
                      s.scores, kScoresStride);
    const bool is_all_seen = count <= tile.count && tile.begin + count <= first_position + 1 &&
                             tile.begin >= a.first_visible(last_position);
    const bool is_plain = is_all_seen && !rule.has_cap() && a.alibi_slopes == nullptr;
    for (int64_t i = 0; i < kBlocks; ++i) {
        float* scores = s.scores + i * kScoresStride;
        if (!is_plain) finish_scores(a, rule, block + i, tile, count, s, scores);
        softmax_block(block + i, count, is_plain ? rule.factor() : 1.0f, scores, s.weights + i * kScoresStride, s);
    }
    multiply<kBlocks>(values, s.weights, kScoresStride, s.padded_dim, count, true, s.out + block * s.block_elements(),
                      s.block_elements());
}

template <typename T>
void attend_tile(const AttentionArguments& a, const Unit& unit, int64_t kv_head, KeyTile tile, State<T>& s) {
    const int64_t padded = ceil_div(tile.count, 32) * 32;
    write_offsets(a, unit.seq, kv_head, tile.begin, tile.begin + tile.count, s.offsets);
    pack_rows(static_cast<const T*>(a.key_cache), s.offsets, tile.count, padded, s.head_dim, s.padded_dim, s.keys);
    const LeftTile<TileElement<T>> keys{s.keys, s.padded_dim, 1};
    const auto values = pack_value_tile(static_cast<const T*>(a.value_cache), s.offsets, tile.count, padded, s.head_dim,
                                        s.padded_dim, s.values);
    const ScoreRule rule(a);
    int64_t block = 0;
    for (; block + 2 <= s.num_blocks; block += 2) attend_blocks<T, 2>(a, rule, tile, keys, values, block, s);
    if (block < s.num_blocks) attend_blocks<T, 1>(a, rule, tile, keys, values, block, s);
}

// Writes out[element][lane] of every block as rows of the output or of the partial results.
template <typename T>
void write_result(const AttentionArguments& a, const Unit& unit, int64_t kv_head, float* partials, const State<T>& s) {
    const bool is_partial = unit.partial_row >= 0;
    const int64_t first_row = is_partial ? unit.partial_row : a.query_start_loc[unit.seq] * a.num_heads;
    // Row of the unit to row of the target: (token, head) in the order of all heads.
    const auto target_row = [&](int64_t row) {
        const int64_t token = unit.query_begin + row / s.group_size, head = kv_head * s.group_size + row % s.group_size;
        return first_row + token * a.num_heads + head;
    };
    for (int64_t block = 0; block < s.num_blocks; ++block) {
        const Vec factor = is_partial ? vec_set(1.0f) : vec_set(1.0f) / vec_load(s.sums + block * kVecWidth);
        const int64_t lanes_used = std::min<int64_t>(kVecWidth, s.num_rows - block * kVecWidth);
        for (int64_t d = 0; d < s.head_dim; d += kVecWidth) {
            const int64_t count = std::min<int64_t>(kVecWidth, s.head_dim - d);
            Vec rows[kVecWidth];
            const float* source = s.out + block * s.block_elements() + d * kVecWidth;
            for (int i = 0; i < kVecWidth; ++i) rows[i] = vec_load(source + i * kVecWidth) * factor;
            transpose(rows);
            for (int64_t lane = 0; lane < lanes_used; ++lane) {
                const int64_t row = target_row(block * kVecWidth + lane);
                if (is_partial) vec_store(partials + row * partial_stride(a) + d, rows[lane], count);
                else vec_store(static_cast<T*>(a.out) + row * s.head_dim + d, rows[lane], count);
            }
        }
    }
    for (int64_t row = 0; is_partial && row < s.num_rows; ++row) {
        float* target = partials + target_row(row) * partial_stride(a);
        target[s.head_dim] = s.maxima[row];
        target[s.head_dim + 1] = s.sums[row];
    }
}

}  // namespace

template <typename T>
void attend_prefill(const AttentionArguments& a, const Unit& unit, int64_t kv_head, float* partials) {
    static thread_local Arena arena;
    State<T> s = reserve_state<T>(a, unit, arena);
#if defined(QUIRE_HAS_AMX)
    const TileSession session;
#endif
    load_queries(a, unit, kv_head, s);
    for (int64_t begin = unit.kv_begin; begin < unit.kv_end; begin += kKeyTile) {
        attend_tile(a, unit, kv_head, KeyTile{begin, std::min(kKeyTile, unit.kv_end - begin)}, s);
    }
    write_result(a, unit, kv_head, partials, s);
}

template void attend_prefill<float>(const AttentionArguments&, const Unit&, int64_t, float*);
template void attend_prefill<bf16>(const AttentionArguments&, const Unit&, int64_t, float*);

}  // namespace quire
