// Comparisons of `Vec` (common.h): to a bit mask in an integer, and to a choice between two vectors.
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

#else

QUIRE_INLINE uint32_t mask_ge(Vec a, Vec b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)));
}

QUIRE_INLINE Vec select_less(Vec a, Vec b, Vec if_less, Vec other) {
    return {_mm256_blendv_ps(other.v, if_less.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}

#endif

}  // namespace quire
