// K-quantised weights in panel-gemm.h: Q4_K, Q5_K and Q6_K, on AVX-512 VNNI.
//
// Columns are quantised to Q8_K's numbers; a vector of a panel holds 4 consecutive k of a column in each lane, and dpbusd
// takes it with 4 weights of one row in all lanes. A sub-block's min costs a product with the sum of a column's codes.
//
// Bytes moved: weights once, at 4.5 (Q4_K), 5.5 (Q5_K), 6.56 (Q6_K) bits each. Bound: dpbusd, 64 products each; scales and
// mins take another quarter, unpacking for 16 columns a sixth.
//
// Refuses nothing: what it does not do it leaves to upstream.
#include "panel-products.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512BW__) && defined(__AVX512DQ__)

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "panel-gemm.h"

static_assert(QK_K == kBlock, "a block of k is a super-block");

namespace {

// ---- columns -----------------------------------------------------------------------------------------------------

// One block of k of up to 16 columns. With only 8 columns a row of codes is 8 * 4 bytes long, and so for sums and d.
struct Codes {
    alignas(64) int8_t codes[QK_K / 4 * 16 * 4]; // [k / 4][column][4]
    alignas(64) int16_t sums[QK_K / 16 * 16];    // [sub-block / 2][column][2] of the codes of a sub-block
    alignas(64) float d[16];
};

// Q8_K's numbers for x [QK_K], as quantize_row_q8_K_ref has them.
float quantise(const float * x, int8_t * codes, int16_t * sums16) {
    __m512 v[QK_K / 16];
    __m512 amax = _mm512_setzero_ps();
    for (int i = 0; i < QK_K / 16; ++i) {
        v[i] = _mm512_loadu_ps(x + 16 * i);
        amax = _mm512_max_ps(_mm512_abs_ps(v[i]), amax); // a NaN counts for nothing
    }
    const float largest = _mm512_reduce_max_ps(amax);
    if (!(largest > 0.0f)) {
        memset(codes, 0, QK_K);
        memset(sums16, 0, QK_K / 16 * sizeof *sums16);
        return 0.0f;
    }
    float max = largest; // with the sign of the first that is as large
    for (int i = 0; i < QK_K / 16; ++i) {
        const unsigned found = _mm512_cmpeq_ps_mask(_mm512_abs_ps(v[i]), _mm512_set1_ps(largest));
        if (found) {
            max = x[16 * i + __builtin_ctz(found)];
            break;
        }
    }
    const float inverse = -127.0f / max;
    for (int i = 0; i < QK_K / 16; ++i) {
        const __m512i q =
            _mm512_min_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(v[i], _mm512_set1_ps(inverse))), _mm512_set1_epi32(127));
        _mm_storeu_si128((__m128i *) (codes + 16 * i), _mm512_cvtepi32_epi8(q));
        sums16[i] = (int16_t) _mm512_reduce_add_epi32(q);
    }
    return 1.0f / inverse;
}

// Block kb of columns [first, first + n) of src1 into the panel, as `width` columns; `sub`: k of a sub-block.
void fill_panel(const ggml_tensor * src1, int64_t kb, int64_t first, int n, int width, int sub, Codes * panel) {
    const int n_sub = QK_K / sub;
    for (int c = 0; c < width; ++c) {
        alignas(64) int8_t codes[QK_K];
        int16_t sums16[QK_K / 16];
        if (c < n) {
            panel->d[c] = quantise(row_of(src1, first + c) + kb * QK_K, codes, sums16);
        } else {
            memset(codes, 0, sizeof codes);
            memset(sums16, 0, sizeof sums16);
            panel->d[c] = 0.0f;
        }
        for (int g = 0; g < QK_K / 4; ++g) {
            memcpy(panel->codes + (g * width + c) * 4, codes + 4 * g, 4);
        }
        for (int s = 0; s < n_sub; ++s) {
            const int16_t sum = sub == 16 ? sums16[s] : (int16_t) (sums16[2 * s] + sums16[2 * s + 1]);
            panel->sums[((s / 2) * width + c) * 2 + s % 2] = sum;
        }
    }
}

// ---- weights -----------------------------------------------------------------------------------------------------

// One block of a few rows, unpacked: the weight is d * scale * code - dmin * min, and a sub-block's min times the sum of
// a column's codes is all that the min costs.
struct Rows {
    alignas(64) uint8_t codes[kRows][QK_K];
    alignas(64) int32_t scales[kRows][16];
    alignas(64) int16_t mins[kRows][16];
    float d[kRows], dmin[kRows];
};

struct Q4 {
    using Block = block_q4_K;
    static constexpr int sub = 32;
    static constexpr bool exact_min = false;
};
struct Q5 {
    using Block = block_q5_K;
    static constexpr int sub = 32;
    static constexpr bool exact_min = false;
};
struct Q6 { // codes of 0 to 63 stand for -32 to 31: a min of 32 scales, taken off in integers
    using Block = block_q6_K;
    static constexpr int sub = 16;
    static constexpr bool exact_min = true;
};

// The 6-bit scales and mins of Q4_K and Q5_K.
void unpack_scales(const uint8_t * packed, int32_t * scales, int16_t * mins) {
    uint32_t word[3];
    memcpy(word, packed, sizeof word);
    const uint64_t low_scales = word[0] & 0x3f3f3f3f, low_mins = word[1] & 0x3f3f3f3f;
    const uint64_t high_scales = (word[2] & 0x0f0f0f0f) | (word[0] >> 6 & 0x03030303) << 4;
    const uint64_t high_mins = (word[2] >> 4 & 0x0f0f0f0f) | (word[1] >> 6 & 0x03030303) << 4;
    const __m128i s = _mm_cvtsi64_si128((long long) (low_scales | high_scales << 32));
    const __m128i m = _mm_cvtsi64_si128((long long) (low_mins | high_mins << 32));
    _mm256_store_si256((__m256i *) scales, _mm256_cvtepu8_epi32(s));
    _mm_store_si128((__m128i *) mins, _mm_cvtepu8_epi16(m));
}

void unpack(const block_q4_K & b, Rows & w, int r) {
    w.d[r] = GGML_CPU_FP16_TO_FP32(b.data.data.d);
    w.dmin[r] = GGML_CPU_FP16_TO_FP32(b.data.data.dmin);
    unpack_scales(b.scales, w.scales[r], w.mins[r]);
    const __m256i low = _mm256_set1_epi8(15);
    for (int j = 0; j < QK_K / 64; ++j) {
        const __m256i q = _mm256_loadu_si256((const __m256i *) (b.qs + 32 * j));
        __m256i * to = (__m256i *) (w.codes[r] + 64 * j);
        _mm256_store_si256(to, _mm256_and_si256(q, low));
        _mm256_store_si256(to + 1, _mm256_and_si256(_mm256_srli_epi16(q, 4), low));
    }
}

void unpack(const block_q5_K & b, Rows & w, int r) {
    w.d[r] = GGML_CPU_FP16_TO_FP32(b.data.data.d);
    w.dmin[r] = GGML_CPU_FP16_TO_FP32(b.data.data.dmin);
    unpack_scales(b.scales, w.scales[r], w.mins[r]);
    const __m256i low = _mm256_set1_epi8(15), one = _mm256_set1_epi8(1);
    const __m256i high = _mm256_loadu_si256((const __m256i *) b.qh);
    for (int j = 0; j < QK_K / 64; ++j) {
        const __m256i q = _mm256_loadu_si256((const __m256i *) (b.qs + 32 * j));
        const auto fifth = [&](int bit) {
            return _mm256_slli_epi16(_mm256_and_si256(_mm256_srli_epi16(high, bit), one), 4);
        };
        __m256i * to = (__m256i *) (w.codes[r] + 64 * j);
        _mm256_store_si256(to, _mm256_or_si256(_mm256_and_si256(q, low), fifth(2 * j)));
        _mm256_store_si256(to + 1, _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(q, 4), low), fifth(2 * j + 1)));
    }
}

void unpack(const block_q6_K & b, Rows & w, int r) {
    w.d[r] = GGML_CPU_FP16_TO_FP32(b.d);
    const __m128i scales = _mm_loadu_si128((const __m128i *) b.scales);
    _mm512_store_si512(w.scales[r], _mm512_cvtepi8_epi32(scales));
    _mm256_store_si256((__m256i *) w.mins[r], _mm256_cvtepi8_epi16(scales));
    const __m256i low = _mm256_set1_epi8(15), two = _mm256_set1_epi8(48);
    for (int j = 0; j < 2; ++j) {
        const __m256i q0 = _mm256_loadu_si256((const __m256i *) (b.ql + 64 * j));
        const __m256i q1 = _mm256_loadu_si256((const __m256i *) (b.ql + 64 * j + 32));
        const __m256i h = _mm256_loadu_si256((const __m256i *) (b.qh + 32 * j));
        __m256i * to = (__m256i *) (w.codes[r] + 128 * j);
        const auto put = [&](int i, __m256i nibble, __m256i high) {
            _mm256_store_si256(to + i, _mm256_or_si256(_mm256_and_si256(nibble, low), _mm256_and_si256(high, two)));
        };
        put(0, q0, _mm256_slli_epi16(h, 4));
        put(1, q1, _mm256_slli_epi16(h, 2));
        put(2, _mm256_srli_epi16(q0, 4), h);
        put(3, _mm256_srli_epi16(q1, 4), _mm256_srli_epi16(h, 2));
    }
}

// ---- a tile ------------------------------------------------------------------------------------------------------

// acc [kTile rows][ld] += rows [first, first + kTile) of w times the panel.
template <class V, class T>
void multiply(const Rows & w, int first, const Codes & panel, float * acc, int64_t ld) {
    using Int = typename V::Int;
    using Float = typename V::Float;
    constexpr int n_sub = QK_K / T::sub;
    Int total[kTile];
    for (int r = 0; r < kTile; ++r) {
        total[r] = V::zero();
    }
    const int8_t * codes = panel.codes;
    for (int s = 0; s < n_sub; ++s) {
        Int sum[kTile];
        for (int r = 0; r < kTile; ++r) {
            sum[r] = V::zero();
        }
#pragma GCC unroll 8
        for (int g = 0; g < T::sub / 4; ++g, codes += V::n * 4) {
            const Int columns = V::load(codes);
            for (int r = 0; r < kTile; ++r) {
                sum[r] = V::dot8(sum[r], V::all(word_at(w.codes[first + r] + s * T::sub + g * 4)), columns);
            }
        }
        for (int r = 0; r < kTile; ++r) {
            total[r] = V::add(total[r], V::mul(sum[r], V::all(w.scales[first + r][s])));
        }
    }
    const Float d = V::load_real(panel.d);
    for (int r = 0; r < kTile; ++r) {
        Int mins = V::zero();
        for (int p = 0; p < n_sub / 2; ++p) {
            mins = V::dot16(mins, V::all(word_at(w.mins[first + r] + 2 * p)), V::load(panel.sums + p * V::n * 2));
        }
        Float value;
        if constexpr (T::exact_min) {
            value = V::mul(V::real(V::sub_32(total[r], mins)), V::all(w.d[first + r]));
        } else {
            value = V::sub_product(V::mul(V::real(total[r]), V::all(w.d[first + r])), V::real(mins),
                                   V::all(w.dmin[first + r]));
        }
        float * to = acc + r * ld;
        V::store(to, V::add_product(V::load_real(to), value, d));
    }
}

// A format of panel-gemm.h.
template <class T>
struct KQuant {
    using Panel = Codes;
    using Weights = Rows;
    static void fill_panel(const ggml_tensor * src1, int64_t kb, int64_t first, int n, int width, Panel * panel) {
        ::fill_panel(src1, kb, first, n, width, T::sub, panel);
    }
    static void unpack(const char * row, int64_t kb, Weights & w, int r) {
        ::unpack(((const typename T::Block *) row)[kb], w, r);
    }
    template <class V>
    static void multiply(const Weights & w, int first, const Panel & panel, float * acc, int64_t ld) {
        ::multiply<V, T>(w, first, panel, acc, ld);
    }
};

} // namespace

size_t ggml_kquant_panels_work_size(int n_tasks, const ggml_tensor * dst) {
    const ggml_type type = dst->src[0]->type;
    const bool ours = type == GGML_TYPE_Q4_K || type == GGML_TYPE_Q5_K || type == GGML_TYPE_Q6_K;
    return ours && panels_fit(dst) ? panel_work_size<KQuant<Q4>>(n_tasks, dst) : 0; // all are of one size
}

bool ggml_compute_forward_mul_mat_kquant_panels(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->use_ref || ggml_kquant_panels_work_size(1, dst) == 0) {
        return false;
    }
    switch (dst->src[0]->type) {
    case GGML_TYPE_Q4_K:
        multiply_panels<KQuant<Q4>>(params, dst);
        break;
    case GGML_TYPE_Q5_K:
        multiply_panels<KQuant<Q5>>(params, dst);
        break;
    default:
        multiply_panels<KQuant<Q6>>(params, dst);
    }
    return true;
}

#else

size_t ggml_kquant_panels_work_size(int, const ggml_tensor *) {
    return 0;
}

bool ggml_compute_forward_mul_mat_kquant_panels(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

#endif
