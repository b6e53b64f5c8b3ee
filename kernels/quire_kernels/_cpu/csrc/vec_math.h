// What attention and sampling need beyond common.h's Vec: comparisons, and a power of two that never meets a denormal
// (which costs a hundred cycles, and softmax makes plenty).
#pragma once

#include "common.h"

namespace quire {

#if defined(QUIRE_HAS_AVX512)

// Bit i is set where a[i] >= b[i]; false for NaN.
QUIRE_INLINE uint32_t mask_ge(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }

// if_less where a < b, otherwise `other`.
QUIRE_INLINE Vec select_less(Vec a, Vec b, Vec if_less, Vec other) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), other.v, if_less.v)};
}

// a with the lowest bits of n's representation added to its exponent.
QUIRE_INLINE Vec add_exponent(Vec a, Vec n) {
    const __m512i shifted = _mm512_slli_epi32(_mm512_castps_si512(n.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), shifted))};
}

#else

QUIRE_INLINE uint32_t mask_ge(Vec a, Vec b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)));
}

QUIRE_INLINE Vec select_less(Vec a, Vec b, Vec if_less, Vec other) {
    return {_mm256_blendv_ps(other.v, if_less.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}

QUIRE_INLINE Vec add_exponent(Vec a, Vec n) {
    const __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(n.v), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), shifted))};
}

#endif

// 2^a for a <= 127, by a minimax polynomial around the nearest integer: relative error 2e-7 with kDegree 5 (and 2^0 is
// 1), 7.5e-5 with 3 (enough for what is rounded to bfloat16). Never less than about 2^-125, even for -inf; NaN stays.
template <int kDegree>
QUIRE_INLINE Vec vec_exp2(Vec a) {
    static_assert(kDegree == 3 || kDegree == 5);
    const Vec clamped = vec_max(vec_set(-125.0f), a);
    const Vec shift = vec_set(12582912.0f);  // 1.5 * 2^23: the sum's lowest bits are the nearest integer
    const Vec n = clamped + shift;
    const Vec r = clamped - (n - shift);
    Vec p = vec_set(0.0f);
    if constexpr (kDegree == 5) {
        p = vec_fma(vec_set(1.326472731307149e-3f), r, vec_set(9.671512991189957e-3f));
        p = vec_fma(p, r, vec_set(5.550733581185341e-2f));
        p = vec_fma(p, r, vec_set(2.4022242426872253e-1f));
        p = vec_fma(p, r, vec_set(6.931470036506653e-1f));
        p = vec_fma(p, r, vec_set(1.0f));
    } else {
        p = vec_fma(vec_set(5.51716685295105e-2f), r, vec_set(2.426111251115799e-1f));
        p = vec_fma(p, r, vec_set(6.932609677314758e-1f));
        p = vec_fma(p, r, vec_set(9.999280571937561e-1f));
    }
    return add_exponent(p, n);
}

}  // namespace quire
