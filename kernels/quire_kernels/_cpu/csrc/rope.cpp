// Rotary positions, and the write of key and value into the paged cache, in one pass over the step's tokens.
//
// query, key, value: [num_tokens][heads][head_dim] with strides for tokens and heads; query and key are rotated in
// place. Caches: [num_blocks][block_size][num_kv_heads][head_dim] with strides for blocks, slots and heads. A row of
// cos_sin: the cosines of rotary_dim / 2 angles, then their sines.
#include "common.h"

namespace quire {

// Packed by cache.py: eight bytes a field, in this order.
struct RopeArguments {
    void *query, *key;
    const void* value;
    const int64_t* positions;  // null: nothing is rotated
    const float* cos_sin;
    void *key_cache, *value_cache;
    const int64_t* slot_mapping;
    int64_t num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim, max_position, num_blocks, block_size;
    int64_t query_stride_token, query_stride_head, key_stride_token, key_stride_head;
    int64_t value_stride_token, value_stride_head;
    int64_t cache_stride_block, cache_stride_slot, cache_stride_head;
    int64_t is_interleaved;
};

namespace {

constexpr int64_t kMinParallelElements = 16384;

// Pairs (i, i + half), as Llama and GPT-NeoX.
template <typename T>
void rotate_neox(T* x, const float* cos, const float* sin, int64_t half) {
    int64_t i = 0;
    for (; i + kVecWidth <= half; i += kVecWidth) {
        const Vec c = vec_load(cos + i), s = vec_load(sin + i);
        const Vec first = vec_load(x + i), second = vec_load(x + half + i);
        vec_store(x + i, first * c - second * s);
        vec_store(x + half + i, second * c + first * s);
    }
    if (i < half) {
        const int64_t rest = half - i;
        const Vec c = vec_load(cos + i, rest), s = vec_load(sin + i, rest);
        const Vec first = vec_load(x + i, rest), second = vec_load(x + half + i, rest);
        vec_store(x + i, first * c - second * s, rest);
        vec_store(x + half + i, second * c + first * s, rest);
    }
}

// Pairs (2i, 2i + 1), as GPT-J.
template <typename T>
void rotate_interleaved(T* x, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float first = to_float(x[2 * i]), second = to_float(x[2 * i + 1]);
        store_scalar(x + 2 * i, first * cos[i] - second * sin[i]);
        store_scalar(x + 2 * i + 1, second * cos[i] + first * sin[i]);
    }
}

template <typename T>
void rotate_token(const RopeArguments& a, int64_t token) {
    const int64_t half = a.rotary_dim / 2;
    const float* cos = a.cos_sin + a.positions[token] * a.rotary_dim;
    const auto rotate = [&](T* x) {
        if (a.is_interleaved != 0) rotate_interleaved(x, cos, cos + half, half);
        else rotate_neox(x, cos, cos + half, half);
    };
    T* query = static_cast<T*>(a.query) + token * a.query_stride_token;
    for (int64_t head = 0; head < a.num_heads; ++head) rotate(query + head * a.query_stride_head);
    T* key = static_cast<T*>(a.key) + token * a.key_stride_token;
    for (int64_t head = 0; head < a.num_kv_heads; ++head) rotate(key + head * a.key_stride_head);
}

template <typename T>
void write_token(const RopeArguments& a, int64_t token) {
    const int64_t slot = a.slot_mapping[token];
    if (slot < 0) return;
    const int64_t target = slot / a.block_size * a.cache_stride_block + slot % a.block_size * a.cache_stride_slot;
    const T* key = static_cast<const T*>(a.key) + token * a.key_stride_token;
    const T* value = static_cast<const T*>(a.value) + token * a.value_stride_token;
    const size_t size = static_cast<size_t>(a.head_dim) * sizeof(T);
    for (int64_t head = 0; head < a.num_kv_heads; ++head) {
        const int64_t offset = target + head * a.cache_stride_head;
        std::memcpy(static_cast<T*>(a.key_cache) + offset, key + head * a.key_stride_head, size);
        std::memcpy(static_cast<T*>(a.value_cache) + offset, value + head * a.value_stride_head, size);
    }
}

// Returns 0, or what is wrong: 1 + token for its position, -1 - token for its slot. Nothing was written then.
template <typename T>
int64_t rope_and_cache(const RopeArguments& a) {
    for (int64_t token = 0; token < a.num_tokens; ++token) {
        const bool is_rotated = a.positions != nullptr;
        if (is_rotated && (a.positions[token] < 0 || a.positions[token] >= a.max_position)) return 1 + token;
        if (a.slot_mapping[token] >= a.num_blocks * a.block_size) return -1 - token;
    }
    const int64_t elements = a.num_tokens * (a.num_heads + 2 * a.num_kv_heads) * a.head_dim;
#pragma omp parallel for schedule(static) if (a.num_tokens > 1 && elements >= kMinParallelElements)
    for (int64_t token = 0; token < a.num_tokens; ++token) {
        if (a.positions != nullptr) rotate_token<T>(a, token);
        write_token<T>(a, token);
    }
    return 0;
}

}  // namespace
}  // namespace quire

QUIRE_EXPORT int64_t quire_rope_and_cache_f32(const quire::RopeArguments* arguments) {
    return quire::rope_and_cache<float>(*arguments);
}

QUIRE_EXPORT int64_t quire_rope_and_cache_bf16(const quire::RopeArguments* arguments) {
    return quire::rope_and_cache<quire::bf16>(*arguments);
}
