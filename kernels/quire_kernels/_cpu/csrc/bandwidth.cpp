// The memory limit that decode is measured against: read bytes and do nothing else.
#include "common.h"

// Reads count bytes (a multiple of 64) with the whole team and returns a value that depends on all of them.
QUIRE_EXPORT int64_t quire_read_memory(const uint8_t* bytes, int64_t count) {
    int64_t total = 0;
#pragma omp parallel reduction(+ : total)
    {
        const quire::Range share = quire::share_of(count / 64, omp_get_thread_num(), omp_get_num_threads());
        const __m256i* line = (const __m256i*)bytes + share.begin * 2;
        __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        for (int64_t i = share.begin; i < share.end; ++i, line += 2) {
            sum[0] = _mm256_add_epi64(sum[0], _mm256_loadu_si256(line));
            sum[1] = _mm256_add_epi64(sum[1], _mm256_loadu_si256(line + 1));
        }
        const __m256i both = _mm256_add_epi64(sum[0], sum[1]);
        total += _mm256_extract_epi64(both, 0) + _mm256_extract_epi64(both, 1) + _mm256_extract_epi64(both, 2) +
                 _mm256_extract_epi64(both, 3);
    }
    return total;
}
