// RMSNorm and LayerNorm over the last dimension, with the residual addition before them.
//
// Rows are x[outer][inner][size] with one stride for each of the first two dimensions, so that heads inside a fused
// query-key-value buffer are read where they lie. The sum with the residual is rounded to T first and normalised as
// rounded: what the next layer reads as residual is what was normalised here. Sums are float32.
#include "common.h"

namespace quire {

// Packed by norm.py: eight bytes a field, in this order.
struct NormArguments {
    const void *x, *residual;
    const float *weight, *bias;
    void *out, *new_residual;
    int64_t num_rows, size, inner;
    int64_t x_stride_outer, x_stride_inner, residual_stride_outer, residual_stride_inner;
    double eps;
};

namespace {

constexpr int64_t kMinParallelElements = 65536;


// Writes x + residual, rounded to T, to `total`.
template <typename T>
void add_row(const T* x, const T* residual, T* total, int64_t size) {
    int64_t i = 0;
    for (; i + kVecWidth <= size; i += kVecWidth) vec_store(total + i, vec_load(x + i) + vec_load(residual + i));
    if (i < size) {
        const int64_t rest = size - i;
        vec_store(total + i, vec_load(x + i, rest) + vec_load(residual + i, rest), rest);
    }
}

template <typename T>
float row_sum(const T* x, int64_t size) {
    Vec sum = vec_zero();
    int64_t i = 0;
    for (; i + kVecWidth <= size; i += kVecWidth) sum = sum + vec_load(x + i);
    if (i < size) sum = sum + vec_load(x + i, size - i);
    return reduce_add(sum);
}

// Returns the sum of (x - mean)^2.
template <typename T>
float row_square_sum(const T* x, int64_t size, float mean) {
    const Vec center = vec_set(mean);
    Vec even = vec_zero(), odd = vec_zero();
    int64_t i = 0;
    for (; i + 2 * kVecWidth <= size; i += 2 * kVecWidth) {
        const Vec a = vec_load(x + i) - center, b = vec_load(x + i + kVecWidth) - center;
        even = vec_fma(a, a, even);
        odd = vec_fma(b, b, odd);
    }
    for (; i < size; i += kVecWidth) {
        const int64_t count = size - i < kVecWidth ? size - i : kVecWidth;
        const Vec a = vec_keep(vec_load(x + i, count) - center, count, vec_zero());
        even = vec_fma(a, a, even);
    }
    return reduce_add(even + odd);
}

template <typename T>
void write_row(const T* x, const NormArguments& a, float mean, float factor, T* out) {
    const Vec center = vec_set(mean), scale = vec_set(factor);
    for (int64_t i = 0; i < a.size; i += kVecWidth) {
        const int64_t count = a.size - i;
        if (count >= kVecWidth) {
            const Vec bias = a.bias == nullptr ? vec_zero() : vec_load(a.bias + i);
            vec_store(out + i, vec_fma((vec_load(x + i) - center) * scale, vec_load(a.weight + i), bias));
        } else {
            const Vec bias = a.bias == nullptr ? vec_zero() : vec_load(a.bias + i, count);
            const Vec normalized = (vec_load(x + i, count) - center) * scale;
            vec_store(out + i, vec_fma(normalized, vec_load(a.weight + i, count), bias), count);
        }
    }
}

template <typename T, bool kIsCentered>
void normalize(const NormArguments& a) {
    const bool is_parallel = a.num_rows > 1 && a.num_rows * a.size >= kMinParallelElements;
#pragma omp parallel for schedule(static) if (is_parallel)
    for (int64_t row = 0; row < a.num_rows; ++row) {
        const int64_t outer = row / a.inner, inner = row % a.inner;
        const T* x = static_cast<const T*>(a.x) + outer * a.x_stride_outer + inner * a.x_stride_inner;
        if (a.residual != nullptr) {
            const int64_t offset = outer * a.residual_stride_outer + inner * a.residual_stride_inner;
            T* total = static_cast<T*>(a.new_residual) + row * a.size;
            add_row(x, static_cast<const T*>(a.residual) + offset, total, a.size);
            x = total;
        }
        const float size = static_cast<float>(a.size);
        const float mean = kIsCentered ? row_sum(x, a.size) / size : 0.0f;
        const float variance = row_square_sum(x, a.size, mean) / size;
        write_row(x, a, mean, 1.0f / __builtin_sqrtf(variance + static_cast<float>(a.eps)),
                  static_cast<T*>(a.out) + row * a.size);
    }
}

}  // namespace
}  // namespace quire

QUIRE_EXPORT void quire_rms_norm_f32(const quire::NormArguments* a) { quire::normalize<float, false>(*a); }
QUIRE_EXPORT void quire_rms_norm_bf16(const quire::NormArguments* a) { quire::normalize<quire::bf16, false>(*a); }
QUIRE_EXPORT void quire_layer_norm_f32(const quire::NormArguments* a) { quire::normalize<float, true>(*a); }
QUIRE_EXPORT void quire_layer_norm_bf16(const quire::NormArguments* a) { quire::normalize<quire::bf16, true>(*a); }
