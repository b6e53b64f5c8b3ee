// Activations, alone and gated: out = f(gate) * up. Computed in float32 whatever the memory holds.
#include "common.h"

namespace quire {
namespace {

constexpr int64_t kMinParallelElements = 16384;

enum class Activation : int64_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };  // activation.py: KINDS

QUIRE_INLINE Vec sigmoid(Vec a) { return vec_set(1.0f) / (vec_set(1.0f) + vec_exp(vec_zero() - a)); }

// erf within 1.5e-7 (Abramowitz and Stegun 7.1.26), for a >= 0.
QUIRE_INLINE Vec erf_positive(Vec a) {
    const Vec t = vec_set(1.0f) / vec_fma(vec_set(0.3275911f), a, vec_set(1.0f));
    Vec p = vec_set(1.061405429f);
    p = vec_fma(p, t, vec_set(-1.453152027f));
    p = vec_fma(p, t, vec_set(1.421413741f));
    p = vec_fma(p, t, vec_set(-0.284496736f));
    p = vec_fma(p, t, vec_set(0.254829592f));
    return vec_set(1.0f) - p * t * vec_exp(vec_zero() - a * a);
}

template <Activation kKind>
QUIRE_INLINE Vec activate(Vec x) {
    if constexpr (kKind == Activation::kSilu) return x * sigmoid(x);
    if constexpr (kKind == Activation::kRelu) return vec_max(vec_zero(), x);
    if constexpr (kKind == Activation::kGeluTanh) {
        // 0.5 (1 + tanh(u)) = sigmoid(2u)
        const Vec cube = x * x * x;
        return x * sigmoid(vec_fma(cube, vec_set(0.044715f), x) * vec_set(1.5957691216057308f));
    }
    // x/2 (1 + erf(x / sqrt 2)), and erf is odd: x/2 + |x|/2 erf(|x| / sqrt 2)
    const Vec magnitude = vec_max(x, vec_zero() - x);
    const Vec half = vec_set(0.5f);
    return vec_fma(half * magnitude, erf_positive(magnitude * vec_set(0.70710678118654752f)), half * x);
}

template <typename T, Activation kKind>
void activate_span(const T* x, const T* up, T* out, int64_t count) {
    int64_t i = 0;
    for (; i + kVecWidth <= count; i += kVecWidth) {
        const Vec value = activate<kKind>(vec_load(x + i));
        vec_store(out + i, up == nullptr ? value : value * vec_load(up + i));
    }
    if (i < count) {
        const int64_t rest = count - i;
        const Vec value = activate<kKind>(vec_load(x + i, rest));
        vec_store(out + i, up == nullptr ? value : value * vec_load(up + i, rest), rest);
    }
}

// x[num_rows][size] (gated: followed in its row by up[size]) to out[num_rows][size]. Work is cut in spans of a row, so
// that one wide row is shared too.
template <typename T, Activation kKind>
void run(const T* x, int64_t stride, bool is_gated, T* out, int64_t num_rows, int64_t size) {
    constexpr int64_t kSpan = 4096;
    const int64_t spans_per_row = ceil_div(size, kSpan);
    const int64_t num_spans = num_rows * spans_per_row;
#pragma omp parallel for schedule(static) if (num_spans > 1 && num_rows * size >= kMinParallelElements)
    for (int64_t index = 0; index < num_spans; ++index) {
        const int64_t row = index / spans_per_row, begin = index % spans_per_row * kSpan;
        const int64_t count = size - begin < kSpan ? size - begin : kSpan;
        const T* source = x + row * stride + begin;
        activate_span<T, kKind>(source, is_gated ? source + size : nullptr, out + row * size + begin, count);
    }
}

template <typename T>
void dispatch(const T* x, int64_t stride, bool is_gated, T* out, int64_t num_rows, int64_t size, int64_t kind) {
    switch (static_cast<Activation>(kind)) {
        case Activation::kSilu: return run<T, Activation::kSilu>(x, stride, is_gated, out, num_rows, size);
        case Activation::kGelu: return run<T, Activation::kGelu>(x, stride, is_gated, out, num_rows, size);
        case Activation::kGeluTanh: return run<T, Activation::kGeluTanh>(x, stride, is_gated, out, num_rows, size);
        case Activation::kRelu: return run<T, Activation::kRelu>(x, stride, is_gated, out, num_rows, size);
    }
}

}  // namespace
}  // namespace quire

QUIRE_EXPORT void quire_activation_f32(const float* x, int64_t stride, int64_t is_gated, float* out, int64_t num_rows,
                                       int64_t size, int64_t kind) {
    quire::dispatch(x, stride, is_gated != 0, out, num_rows, size, kind);
}

QUIRE_EXPORT void quire_activation_bf16(const quire::bf16* x, int64_t stride, int64_t is_gated, quire::bf16* out,
                                        int64_t num_rows, int64_t size, int64_t kind) {
    quire::dispatch(x, stride, is_gated != 0, out, num_rows, size, kind);
}
