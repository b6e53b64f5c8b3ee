// What every CPU kernel shares: the export macro, bfloat16, and one float vector type.
//
// Every csrc/*.cpp is compiled once per instruction set, with exactly one of QUIRE_ISA_AVX2, QUIRE_ISA_AVX512,
// QUIRE_ISA_AMX defined (see build.py). Kernels are written against `Vec` (8 floats with AVX2, 16 with AVX-512) and so
// exist once; only the matrix product has code per instruction set. AMX implies AVX-512.
//
// The ABI is plain C: pointers, int64_t sizes, strides in elements; no torch and no Python headers. Shapes, types and
// strides are checked by the Python side. Kernels allocate nothing on the heap in the steady state and throw nothing.
#pragma once

#include <immintrin.h>
#include <omp.h>

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(QUIRE_ISA_AMX)
#define QUIRE_HAS_AVX512 1
#define QUIRE_HAS_AMX 1
#elif defined(QUIRE_ISA_AVX512)
#define QUIRE_HAS_AVX512 1
#elif !defined(QUIRE_ISA_AVX2)
#error "compile with -DQUIRE_ISA_AVX2, -DQUIRE_ISA_AVX512 or -DQUIRE_ISA_AMX (python -m quire_kernels.build)"
#endif

#define QUIRE_EXPORT extern "C" __attribute__((visibility("default")))
#define QUIRE_INLINE inline __attribute__((always_inline))

namespace quire {

// ------------------------------------------------------------------------------------------------------------- scalars

struct bf16 {
    uint16_t bits;
};

QUIRE_INLINE float to_float(float value) { return value; }

QUIRE_INLINE float to_float(bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
}

// Rounds to nearest even; a NaN stays a (quiet) NaN.
QUIRE_INLINE bf16 to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

QUIRE_INLINE void store_scalar(float* target, float value) { *target = value; }
QUIRE_INLINE void store_scalar(bf16* target, float value) { *target = to_bf16(value); }

constexpr float kInfinity = std::numeric_limits<float>::infinity();

QUIRE_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The contiguous share [begin, end) of `total` items that thread `index` of `count` owns; sizes differ by at most one.
struct Range {
    int64_t begin, end;
};
QUIRE_INLINE Range share_of(int64_t total, int64_t index, int64_t count) {
    return {total * index / count, total * (index + 1) / count};
}

// -------------------------------------------------------------------------------------------------------------- vector

// Vec: kVecWidth floats. load/store exist for float and bf16 memory (bf16 is widened on load and rounded to nearest even
// on store), whole or only the first `count` lanes (0 <= count <= kVecWidth; other lanes read as zero and are not
// written).

#if defined(QUIRE_HAS_AVX512)

constexpr int kVecWidth = 16;

struct Vec {
    __m512 v;
};

QUIRE_INLINE __mmask16 lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1u); }
QUIRE_INLINE __m512 widen(__m256i raw) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
QUIRE_INLINE __m256i narrow(Vec a) { return (__m256i)_mm512_cvtneps_pbh(a.v); }

QUIRE_INLINE Vec vec_zero() { return {_mm512_setzero_ps()}; }
QUIRE_INLINE Vec vec_set(float value) { return {_mm512_set1_ps(value)}; }
QUIRE_INLINE Vec vec_load(const float* p) { return {_mm512_loadu_ps(p)}; }
QUIRE_INLINE Vec vec_load(const bf16* p) { return {widen(_mm256_loadu_si256((const __m256i*)p))}; }
QUIRE_INLINE Vec vec_load(const float* p, int64_t count) { return {_mm512_maskz_loadu_ps(lanes(count), p)}; }
QUIRE_INLINE Vec vec_load(const bf16* p, int64_t count) { return {widen(_mm256_maskz_loadu_epi16(lanes(count), p))}; }
QUIRE_INLINE void vec_store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
QUIRE_INLINE void vec_store(bf16* p, Vec a) { _mm256_storeu_si256((__m256i*)p, narrow(a)); }
QUIRE_INLINE void vec_store(float* p, Vec a, int64_t count) { _mm512_mask_storeu_ps(p, lanes(count), a.v); }
QUIRE_INLINE void vec_store(bf16* p, Vec a, int64_t count) { _mm256_mask_storeu_epi16(p, lanes(count), narrow(a)); }

QUIRE_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
QUIRE_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
QUIRE_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
QUIRE_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
QUIRE_INLINE Vec vec_fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
QUIRE_INLINE Vec vec_max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
QUIRE_INLINE Vec vec_min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
QUIRE_INLINE Vec vec_round(Vec a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
QUIRE_INLINE float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
QUIRE_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }

// a * 2^n for integral n within [-150, 128]; underflows gradually, overflows to infinity.
QUIRE_INLINE Vec vec_scale2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

// `a` in its first `count` lanes, `other` in the rest.
QUIRE_INLINE Vec vec_keep(Vec a, int64_t count, Vec other) {
    return {_mm512_mask_blend_ps(lanes(count), other.v, a.v)};
}

#else  // AVX2

constexpr int kVecWidth = 8;

struct Vec {
    __m256 v;
};

QUIRE_INLINE __m256i lanes(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
QUIRE_INLINE __m256 widen(__m128i raw) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
QUIRE_INLINE __m128i narrow(Vec a) {
    const __m256i bits = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), is_nan);
    const __m256i high = _mm256_srli_epi32(kept, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

QUIRE_INLINE Vec vec_zero() { return {_mm256_setzero_ps()}; }
QUIRE_INLINE Vec vec_set(float value) { return {_mm256_set1_ps(value)}; }
QUIRE_INLINE Vec vec_load(const float* p) { return {_mm256_loadu_ps(p)}; }
QUIRE_INLINE Vec vec_load(const bf16* p) { return {widen(_mm_loadu_si128((const __m128i*)p))}; }
QUIRE_INLINE Vec vec_load(const float* p, int64_t count) { return {_mm256_maskload_ps(p, lanes(count))}; }
QUIRE_INLINE Vec vec_load(const bf16* p, int64_t count) {
    bf16 buffer[kVecWidth] = {};
    for (int64_t i = 0; i < count; ++i) buffer[i] = p[i];
    return vec_load(buffer);
}
QUIRE_INLINE void vec_store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
QUIRE_INLINE void vec_store(bf16* p, Vec a) { _mm_storeu_si128((__m128i*)p, narrow(a)); }
QUIRE_INLINE void vec_store(float* p, Vec a, int64_t count) { _mm256_maskstore_ps(p, lanes(count), a.v); }
QUIRE_INLINE void vec_store(bf16* p, Vec a, int64_t count) {
    bf16 buffer[kVecWidth];
    vec_store(buffer, a);
    for (int64_t i = 0; i < count; ++i) p[i] = buffer[i];
}

QUIRE_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
QUIRE_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
QUIRE_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
QUIRE_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
QUIRE_INLINE Vec vec_fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
QUIRE_INLINE Vec vec_max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
QUIRE_INLINE Vec vec_min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
QUIRE_INLINE Vec vec_round(Vec a) {
    return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
QUIRE_INLINE float reduce_add(Vec a) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
QUIRE_INLINE float reduce_max(Vec a) {
    const __m128 half = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    const __m128 quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}

// a * 2^n for integral n within [-150, 128]; underflows gradually, overflows to infinity. Two factors, because 2^-150
// and 2^128 are no normal floats themselves.
QUIRE_INLINE Vec vec_scale2(Vec a, Vec n) {
    const __m256i exponent = _mm256_cvtps_epi32(n.v);
    const __m256i first = _mm256_srai_epi32(exponent, 1);
    const __m256i second = _mm256_sub_epi32(exponent, first);
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256 factor1 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(first, bias), 23));
    const __m256 factor2 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(second, bias), 23));
    return {_mm256_mul_ps(_mm256_mul_ps(a.v, factor1), factor2)};
}

// `a` in its first `count` lanes, `other` in the rest.
QUIRE_INLINE Vec vec_keep(Vec a, int64_t count, Vec other) {
    return {_mm256_blendv_ps(other.v, a.v, _mm256_castsi256_ps(lanes(count)))};
}

#endif

// e^a, within 2 ulp of float32; e^-inf = 0, e^inf = inf, NaN stays NaN (min and max return their second
// operand then). Cephes' expf polynomial after a = n ln2 + r, |r| <= ln2 / 2.
QUIRE_INLINE Vec vec_exp(Vec a) {
    const Vec clamped = vec_max(vec_set(-104.0f), vec_min(vec_set(89.0f), a));
    const Vec n = vec_round(clamped * vec_set(1.44269504088896341f));
    Vec r = vec_fma(n, vec_set(-0.693359375f), clamped);
    r = vec_fma(n, vec_set(2.12194440e-4f), r);
    Vec p = vec_set(1.9875691500e-4f);
    p = vec_fma(p, r, vec_set(1.3981999507e-3f));
    p = vec_fma(p, r, vec_set(8.3334519073e-3f));
    p = vec_fma(p, r, vec_set(4.1665795894e-2f));
    p = vec_fma(p, r, vec_set(1.6666665459e-1f));
    p = vec_fma(p, r, vec_set(5.0000001201e-1f));
    return vec_scale2(vec_fma(p, r * r, r + vec_set(1.0f)), n);
}

}  // namespace quire
