// For products with k across the lanes of tree-gemm.h's vectors, on AVX-512 or on AVX2 with FMA and F16C: what else turns
// into floats, and the lanes of many vectors added at once. PF_FLOAT_LANES: how many lanes, where there is all that.
#pragma once

#include "tree-gemm.h"

#if defined(__AVX512F__) && defined(__AVX512VL__) && defined(__AVX512BW__) && defined(__AVX512DQ__)

#define PF_FLOAT_LANES 16

#include "lane-sums.h"

static inline tree_vec lanes_of_f16(const void * p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p));
}
static inline tree_vec lanes_of_bf16(const void * p) {
    const __m256i x = _mm256_loadu_si256((const __m256i *) p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
static inline tree_vec rounded_to_f16(tree_vec x) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

static inline void store_codes(float * to, __m128i codes, float scale) { // 16 of 8 bits
    const __m512 x = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
    _mm512_storeu_ps(to, _mm512_mul_ps(x, _mm512_set1_ps(scale)));
}

// Of v[4]: their sums over the lanes, unfinished.
static inline tree_vec sums_of_four(const tree_vec * v) {
    return quarter_sums(v);
}
// Of four of those: the sums of the 16 vectors behind them, of which the first n are stored.
static inline void store_sums(float * to, int n, const tree_vec * fours) {
    _mm512_mask_storeu_ps(to, (__mmask16) ((1u << n) - 1), sums_of_quarters(fours));
}
// Lane i: the sum of v[i], of as many vectors as there are lanes.
static inline tree_vec sums_of_lanes(const tree_vec * v) {
    return lane_sums(v);
}

#elif !defined(__AVX512F__) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#define PF_FLOAT_LANES 8

#include <immintrin.h>

#include <algorithm>

static inline tree_vec lanes_of_f16(const void * p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p));
}
static inline tree_vec lanes_of_bf16(const void * p) {
    const __m128i x = _mm_loadu_si128((const __m128i *) p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
static inline tree_vec rounded_to_f16(tree_vec x) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

static inline void store_codes(float * to, __m128i codes, float scale) {
    const __m256 by = _mm256_set1_ps(scale);
    const auto floats = [&](__m128i x) { return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)), by); };
    _mm256_storeu_ps(to, floats(codes));
    _mm256_storeu_ps(to + 8, floats(_mm_srli_si128(codes, 8)));
}

static inline tree_vec sums_of_four(const tree_vec * v) { // lane 4 h + i: half h of v[i]
    return _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
}
static inline tree_vec add_halves(tree_vec a, tree_vec b) {
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
static inline void store_sums(float * to, int n, const tree_vec * fours) {
    alignas(32) float sums[16];
    _mm256_store_ps(sums, add_halves(fours[0], fours[1]));
    _mm256_store_ps(sums + 8, add_halves(fours[2], fours[3]));
    std::copy_n(sums, n, to);
}
static inline tree_vec sums_of_lanes(const tree_vec * v) {
    return add_halves(sums_of_four(v), sums_of_four(v + 4));
}

#endif
