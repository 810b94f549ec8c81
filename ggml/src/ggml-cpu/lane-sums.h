// Sums over the lanes of 16 AVX-512 vectors, all at once.
//
// A product with k across the lanes ends in vectors that still have to be summed. One by one that takes 4 shuffles and 4
// additions each; 16 vectors transposed while they are added take 30 and 15 for all. The order is the same for every
// vector: lanes 2 apart, then neighbours, then quarters 0 + 1 and 2 + 3, then those.
#pragma once

#include <immintrin.h>

// Quarter q of the result, lane i of it: the sum of quarter q of v[i], i < 4.
static inline __m512 quarter_sums(const __m512 * v) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    return _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
}

// Lane 4 i + j: the sum of vector j of the four that became q[i].
static inline __m512 sums_of_quarters(const __m512 * q) {
    const auto halve = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return halve(halve(q[0], q[1]), halve(q[2], q[3]));
}

// Lane i: the sum of v[i], i < 16.
static inline __m512 lane_sums(const __m512 * v) {
    const __m512 quarters[4] = {quarter_sums(v), quarter_sums(v + 4), quarter_sums(v + 8), quarter_sums(v + 12)};
    return sums_of_quarters(quarters);
}
