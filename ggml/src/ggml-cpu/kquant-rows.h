// Blocks of Q4_K, Q5_K and Q6_K as kquant-gemm.cpp multiplies them: the 256 codes of a row in 4 vectors, in registers.
//
// A lane belongs to one sub-block in all 4 vectors, so the products of 16 k are summed before a scale is applied, and one
// vector of scales takes all 256. Which k lies where is the format's own: columns are stored where `place` says.
#pragma once

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include <immintrin.h>

#include <cstdint>

namespace kquant {

static inline __m512i bytes64(const void * p) {
    return _mm512_loadu_si512(p);
}
static inline __m512i quarter(const void * p) { // in all 4
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) p));
}
static inline __m512i words(int a, int b, int c, int d) { // of every quarter
    return _mm512_set4_epi32(d, c, b, a);
}
static inline __m512i by_quarter(int word) { // 0, word, 2 word, 3 word
    const __m512i quarters = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_mullo_epi32(quarters, _mm512_set1_epi32(word));
}
static inline __m512i and_or(__m512i a, __m512i mask, __m512i b) { // (a & mask) | b
    return _mm512_ternarylogic_epi32(a, mask, b, 0xea);
}

// ---- Q4_K, Q5_K --------------------------------------------------------------------------------------------------

// Both begin with d, dmin and 8 scales and 8 mins of 6 bits, 16 bytes in all. A weight is d * scale * code - dmin * min.
// `narrow`: the sum of 16 products fits 16 bits, and pairs of such sums are scaled at once.
template <class B, bool is_narrow>
struct WithMins {
    using Block = B;
    static constexpr bool mins = true, narrow = is_narrow;

    // Quarter j has 8 k of the low nibbles of 32 bytes, sub-block 2 j, and 8 of the high ones, 2 j + 1.
    static constexpr int together = 8;
    static int place(int k) { return k / 8 % 4 * 64 + k / 64 * 16 + k / 32 % 2 * 8 + k % 8; }

    // Of 4 rows.
    struct Head {
        __m512 d, dmin;                        // [any][row]
        __m512i mins;                          // [row][8] of 16 bits
        alignas(64) uint8_t factors[4][2 * 8]; // [row]: scales, mins

        explicit Head(const Block * const * b) {
            const auto pair = [&](int r) {
                const __m256i first = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) b[r]));
                return _mm256_inserti128_si256(first, _mm_loadu_si128((const __m128i *) b[r + 1]), 1);
            };
            const __m512i heads = _mm512_inserti64x4(_mm512_castsi256_si512(pair(0)), pair(2), 1);
            // Words: d and dmin; scales 0-3; mins 0-3; 4 bits of scales 4-7 and of mins 4-7, whose upper 2 bits are above
            // the others' 6.
            const __m512i low = _mm512_srlv_epi32(_mm512_shuffle_epi32(heads, _MM_PERM_DCDB), words(0, 0, 0, 4));
            const __m512i high = _mm512_srli_epi32(_mm512_shuffle_epi32(heads, _MM_PERM_CCBB), 2);
            const __m512i all = and_or(low, words(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f),
                                       _mm512_and_si512(high, words(0, 0x30303030, 0, 0x30303030)));
            _mm512_store_si512(factors, all);
            mins = _mm512_unpackhi_epi8(all, _mm512_setzero_si512());
            const __m512i halves = _mm512_permutexvar_epi32(words(0, 4, 8, 12), heads);
            d = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(halves));
            dmin = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(halves, 16)));
        }

        // Of row r and every lane; if narrow, of pairs of lanes of two columns.
        __m512i scales(const Block &, int r) const {
            constexpr int even = (int) (narrow ? 0x80008000 : 0x80808000), odd = even + (narrow ? 0x10001 : 1);
            const __m512i first = narrow ? words(even, odd, even, odd) : words(even, even, odd, odd);
            return _mm512_shuffle_epi8(quarter(factors[r]), _mm512_add_epi32(first, by_quarter(narrow ? 0x20002 : 2)));
        }
    };

    // Quarter j: the first 16 of 32 bytes, and the others.
    static void bytes(const Block & b, __m512i * halves) {
        const __m512i first = bytes64(b.qs), last = bytes64(b.qs + 64);
        halves[0] = _mm512_shuffle_i32x4(first, last, 0x88);
        halves[1] = _mm512_shuffle_i32x4(first, last, 0xdd);
    }
};

struct Q4 : WithMins<block_q4_K, true> { // 16 * 15 * 127
    static void unpack(const Block & b, __m512i * codes) {
        const __m512i low = _mm512_set1_epi8(15);
        __m512i halves[2];
        bytes(b, halves);
        for (int i = 0; i < 2; ++i) {
            const __m512i lows = _mm512_and_si512(halves[i], low);
            const __m512i highs = _mm512_and_si512(_mm512_srli_epi16(halves[i], 4), low);
            codes[2 * i] = _mm512_unpacklo_epi64(lows, highs);
            codes[2 * i + 1] = _mm512_unpackhi_epi64(lows, highs);
        }
    }
};

struct Q5 : WithMins<block_q5_K, false> {
    static void unpack(const Block & b, __m512i * codes) {
        const __m512i low = _mm512_set1_epi8(15), fifth = _mm512_set1_epi8(16);
        __m512i halves[2];
        bytes(b, halves);
        for (int i = 0; i < 2; ++i) {
            // In quarter j, bits 2 j and 2 j + 1 are those of the low and the high nibble: turned until they are bit 4.
            const __m512i high = quarter(b.qh + 16 * i);
            const auto put = [&](__m512i nibble, int bit) {
                const __m512i by = _mm512_sub_epi32(_mm512_set1_epi32(4 - bit), by_quarter(2));
                return and_or(nibble, low, _mm512_and_si512(_mm512_rolv_epi32(high, by), fifth));
            };
            const __m512i lows = put(halves[i], 0), highs = put(_mm512_srli_epi16(halves[i], 4), 1);
            codes[2 * i] = _mm512_unpacklo_epi64(lows, highs);
            codes[2 * i + 1] = _mm512_unpackhi_epi64(lows, highs);
        }
    }
};

// ---- Q6_K --------------------------------------------------------------------------------------------------------

// A weight is d * scale * (code - 32).
struct Q6 {
    using Block = block_q6_K;
    static constexpr bool mins = false, narrow = false;
    static constexpr int zero = -32;

    // Quarter j has 4 k of sub-blocks j, 8 + j, 4 + j, 12 + j.
    static constexpr int together = 4;
    static int place(int k) { return k / 4 % 4 * 64 + k / 16 % 4 * 16 + k / 64 % 2 * 8 + k / 128 * 4 + k % 4; }

    struct Head {
        __m512 d; // [any][row]

        explicit Head(const Block * const * b) {
            const __m128i halves = _mm_setr_epi16(b[0]->d, b[1]->d, b[2]->d, b[3]->d, 0, 0, 0, 0);
            d = _mm512_broadcast_f32x4(_mm_cvtph_ps(halves));
        }
        __m512i scales(const Block & b, int) const { // by way of the uppermost byte, for their signs
            const __m512i at = words(0, 0x08000000, 0x04000000, 0x0c000000);
            const __m512i upper = _mm512_shuffle_epi8(quarter(b.scales), _mm512_add_epi32(at, by_quarter(0x01000000)));
            return _mm512_srai_epi32(upper, 24);
        }
    };

    static void unpack(const Block & b, __m512i * codes) {
        const __m512i low = _mm512_set1_epi8(15), two = _mm512_set1_epi8(48);
        // ql: low nibbles are sub-blocks 0-3 of the first 64 bytes, 8-11 of the others; high nibbles are 4 further on.
        const __m512i first = bytes64(b.ql), last = bytes64(b.ql + 64);
        const __m512i nibbles[2] = {_mm512_unpacklo_epi64(first, last), _mm512_unpackhi_epi64(first, last)};
        // qh: 16 bytes have bits 0 and 1 for sub-block j, 2 and 3 for j + 2, and those of the high nibbles above.
        const __m512i bits = bytes64(b.qh), by = _mm512_setr_epi64(0, 0, 0, 0, 2, 2, 2, 2);
        for (int i = 0; i < 2; ++i) {
            const __m512i from = _mm512_add_epi64(_mm512_setr_epi64(0, 4, 2, 6, 0, 4, 2, 6), _mm512_set1_epi64(i));
            const __m512i high = _mm512_srlv_epi64(_mm512_permutexvar_epi64(from, bits), by);
            const auto put = [&](__m512i nibble, __m512i upper) {
                return _mm512_castsi512_ps(and_or(nibble, low, _mm512_and_si512(upper, two)));
            };
            const __m512 lows = put(nibbles[i], _mm512_slli_epi16(high, 4));
            const __m512 highs = put(_mm512_srli_epi16(nibbles[i], 4), high);
            codes[2 * i] = _mm512_castps_si512(_mm512_shuffle_ps(lows, highs, 0x88));
            codes[2 * i + 1] = _mm512_castps_si512(_mm512_shuffle_ps(lows, highs, 0xdd));
        }
    }
};

} // namespace kquant
