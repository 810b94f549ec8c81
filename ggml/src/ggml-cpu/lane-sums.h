// Sums over the lanes of 16 AVX-512 vectors, all at once.
//
// A product with k across the lanes ends in vectors that still have to be summed. One by one that takes 4 shuffles and 4
// additions each; 16 vectors transposed while they are added take 30 and 15 for all. The order is the same for every
// vector: lanes 2 apart, then neighbours, then quarters 0 + 1 and 2 + 3, then those.
#pragma once

#include <immintrin.h>

// Lane i: the sum of v[i], i < 16.
static inline __m512 lane_sums(const __m512 * v) {
    __m512 quarters[4]; // [row of 4][quarter of a vector][row]
    for (int i = 0; i < 4; ++i, v += 4) {
        const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
        const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
        const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        quarters[i] = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    }
    const auto halve = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return halve(halve(quarters[0], quarters[1]), halve(quarters[2], quarters[3]));
}
