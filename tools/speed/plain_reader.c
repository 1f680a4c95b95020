/* Reads a buffer as plainly as C can: AVX2, 128 bytes an iteration in four accumulators, nothing prefetched.
 * tools/speed/compare_bandwidth.py compiles it and calls it from threads of its own. */
#include <immintrin.h>
#include <stddef.h>

long long read_share(const char *start, size_t bytes)
{
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    for (const char *end = start + bytes; start < end; start += 128) {
        a = _mm256_add_epi64(a, _mm256_loadu_si256((const __m256i *)start));
        b = _mm256_add_epi64(b, _mm256_loadu_si256((const __m256i *)(start + 32)));
        c = _mm256_add_epi64(c, _mm256_loadu_si256((const __m256i *)(start + 64)));
        d = _mm256_add_epi64(d, _mm256_loadu_si256((const __m256i *)(start + 96)));
    }
    long long lanes[4];
    _mm256_storeu_si256((__m256i *)lanes, _mm256_add_epi64(_mm256_add_epi64(a, b), _mm256_add_epi64(c, d)));
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}
