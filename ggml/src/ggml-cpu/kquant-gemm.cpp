// Products of Q4_K, Q5_K and Q6_K weights with any number of columns, on AVX-512 VNNI.
//
// k lies across the lanes: 4 vectors of a row's codes, unpacked in registers (kquant-rows.h), meet those of every column, and
// the integers of 4 rows and 4 columns are summed while they are transposed. Only then are they floats, one for a row's block
// and a column, so an element of the product has its bits whatever stands beside it: a plain step, a tree and a prompt get
// the same.
//
// Columns are quantised to Q8_K's numbers. Bytes moved: weights once, at 4.5 (Q4_K), 5.5 (Q5_K), 6.56 (Q6_K) bits each.
// Bound: 64 products a dpbusd, which is two thirds of what a column takes; unpacking a row is worth 2 to 4 columns.
//
// Refuses nothing: what it does not do it leaves to upstream.
#include "weight-products.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512BW__) && defined(__AVX512DQ__)

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "kquant-rows.h"
#include "tree-work.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

namespace {

constexpr int kRows = 8;   // multiplied at a time: 16 at once come at 30 GB/s, 8 at 40
constexpr int kPiece = 8;  // of so many rows, that a thread takes at most
constexpr int kQuads = 16; // of columns, that meet them at a time

// ---- columns -----------------------------------------------------------------------------------------------------

// One block of 4 columns.
template <class T>
struct Quad {
    alignas(64) int8_t codes[4][QK_K]; // where T::place says
    alignas(64) float d[4][4];         // [column][any]
    // For mins: the sums of the codes of 32 k. Else where the sum of a lane begins: at T::zero times the sum of its codes.
    alignas(64) std::conditional_t<T::mins, int16_t[4][8], int32_t[4][16]> aside;
};

// Q8_K's numbers for x [QK_K], as quantize_row_q8_K_ref has them. Returns d.
template <class T>
float quantise(const float * x, int8_t * codes) {
    __m512 v[QK_K / 16];
    __m512 amax = _mm512_setzero_ps();
    unsigned no_numbers = 0;
    for (int i = 0; i < QK_K / 16; ++i) {
        v[i] = _mm512_loadu_ps(x + 16 * i);
        amax = _mm512_max_ps(_mm512_abs_ps(v[i]), amax);
        no_numbers |= _mm512_cmp_ps_mask(v[i], v[i], _CMP_UNORD_Q);
    }
    if (no_numbers) { // and no product with them is one
        memset(codes, 0, QK_K);
        return NAN;
    }
    const float largest = _mm512_reduce_max_ps(amax);
    if (!(largest > 0.0f)) {
        memset(codes, 0, QK_K);
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
        const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], _mm512_set1_ps(inverse)));
        int8_t bytes[16];
        _mm_storeu_si128((__m128i *) bytes, _mm512_cvtepi32_epi8(_mm512_min_epi32(q, _mm512_set1_epi32(127))));
        for (int j = 0; j < 16; j += T::together) {
            memcpy(codes + T::place(16 * i + j), bytes + j, T::together);
        }
    }
    return 1.0f / inverse;
}

// Block kb of columns [first, first + n) of src1.
template <class T>
void fill(const ggml_tensor * src1, int64_t kb, int64_t first, int n, Quad<T> & to) {
    for (int c = 0; c < 4; ++c) {
        float d = 0.0f;
        if (c < n) {
            d = quantise<T>(row_of(src1, first + c) + kb * QK_K, to.codes[c]);
        } else {
            memset(to.codes[c], 0, QK_K);
        }
        _mm_store_ps(to.d[c], _mm_set1_ps(d));
        __m512i sums = _mm512_setzero_si512();
        for (int i = 0; i < 4; ++i) {
            sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_load_si512(to.codes[c] + 64 * i));
        }
        if constexpr (T::mins) {
            sums = _mm512_add_epi32(sums, _mm512_srli_epi64(sums, 32));
            _mm_store_si128((__m128i *) to.aside[c], _mm512_cvtepi64_epi16(sums));
        } else {
            _mm512_store_si512(to.aside[c], _mm512_mullo_epi32(sums, _mm512_set1_epi32(T::zero)));
        }
    }
}

// ---- sums of lanes -----------------------------------------------------------------------------------------------

// [2 of a, 2 of b]: quarters whose sum is that of all 4.
inline __m512i halve(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_mask_blend_epi64(0xf0, a, b), _mm512_shuffle_i64x2(a, b, 0x4e));
}

// [a, a, b, b]: quarters 0 + 1 and 2 + 3 of each.
inline __m512i add_quarters(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

// In every quarter [a, a, b, b]: lanes 0 + 1 and 2 + 3 of each.
inline __m512i add_neighbours(__m512i a, __m512i b) {
    const __m512 x = _mm512_castsi512_ps(a), y = _mm512_castsi512_ps(b);
    return _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(x, y, 0x88)),
                            _mm512_castps_si512(_mm512_shuffle_ps(x, y, 0xdd)));
}

// In every quarter, lane i: the sum of the 4 lanes of v[i].
inline __m512i sum_quarters(const __m512i * v) {
    const auto pair = [](__m512i a, __m512i b) { // [2 of a, 2 of b]
        return _mm512_add_epi32(_mm512_mask_blend_epi32(0xcccc, a, b), _mm512_alignr_epi8(b, a, 8));
    };
    return add_neighbours(pair(v[0], v[1]), pair(v[2], v[3]));
}

// ---- a tile ------------------------------------------------------------------------------------------------------

// A row's block times C columns, given the sums of products of every lane; what `finish` makes of 4 rows.
template <class T, int C>
inline __m512i scale(__m512i * sums, __m512i scales) {
    if constexpr (T::narrow) { // [column of a pair][2] in every quarter
        const __m512i ab = _mm512_madd_epi16(_mm512_packs_epi32(sums[0], sums[1]), scales);
        const __m512i cd = _mm512_madd_epi16(_mm512_packs_epi32(sums[2], sums[3]), scales);
        return C == 1 ? ab : halve(ab, C == 2 ? _mm512_setzero_si512() : cd);
    }
    for (int c = 0; c < C; ++c) {
        sums[c] = _mm512_mullo_epi32(sums[c], scales);
    }
    return C == 1 ? sums[0] : add_quarters(halve(sums[0], sums[1]), halve(sums[2], sums[3]));
}

// [column][row]
template <class T, int C>
inline __m512i finish(const __m512i * rows) {
    if (C == 1) { // in all quarters
        const __m512i sum = sum_quarters(rows), two = _mm512_add_epi32(sum, _mm512_shuffle_i64x2(sum, sum, 0x4e));
        return _mm512_add_epi32(two, _mm512_shuffle_i32x4(two, two, 0xb1));
    }
    if (T::narrow) { // [pair of rows][pair of columns][row][column]
        const __m512i sum = add_quarters(add_neighbours(rows[0], rows[1]), add_neighbours(rows[2], rows[3]));
        return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15), sum);
    }
    return sum_quarters(rows);
}

// The mins of 4 rows times the sums of C columns, [column][row].
template <class T, int C>
inline __m512i multiply_mins(const typename T::Head & head, const Quad<T> & x) {
    if (C == 1) {
        const __m512i sum = _mm512_madd_epi16(head.mins, kquant::quarter(x.aside[0]));
        const __m512i two = _mm512_add_epi32(sum, _mm512_shuffle_epi32(sum, _MM_PERM_BADC));
        const __m512i one = _mm512_add_epi32(two, _mm512_shuffle_epi32(two, _MM_PERM_CDAB));
        return _mm512_permutexvar_epi32(_mm512_set4_epi32(12, 8, 4, 0), one);
    }
    alignas(64) int16_t mins[4][8];
    _mm512_store_si512(mins, head.mins);
    __m512i rows[4];
    for (int r = 0; r < 4; ++r) {
        rows[r] = _mm512_madd_epi16(kquant::quarter(mins[r]), _mm512_load_si512(x.aside));
    }
    return sum_quarters(rows);
}

// sums[r]: the block of row r, of 2, times C columns. Two rows, since every column is loaded for both.
template <class T, int C>
__attribute__((always_inline)) inline void multiply_quad(const __m512i codes[2][4], const __m512i * scales,
                                                         const Quad<T> & x, __m512i * sums) {
    __m512i dots[2][4];
    for (int c = 0; c < 4; ++c) {
        dots[0][c] = dots[1][c] = _mm512_setzero_si512();
        if constexpr (!T::mins) {
            if (c < C) {
                dots[0][c] = dots[1][c] = _mm512_load_si512(x.aside[c]);
            }
        }
    }
    for (int i = 0; i < 4; ++i) {
        for (int c = 0; c < C; ++c) {
            const __m512i column = _mm512_load_si512(x.codes[c] + 64 * i);
            dots[0][c] = _mm512_dpbusd_epi32(dots[0][c], codes[0][i], column);
            dots[1][c] = _mm512_dpbusd_epi32(dots[1][c], codes[1][i], column);
        }
    }
    sums[0] = scale<T, C>(dots[0], scales[0]);
    sums[1] = scale<T, C>(dots[1], scales[1]);
}

// acc [column][row] += a block of 4 rows times C columns.
template <class T, int C>
inline void add(const typename T::Head & head, const __m512i * sums, const Quad<T> & x, __m512 & acc) {
    __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(finish<T, C>(sums)), head.d);
    if constexpr (T::mins) {
        value = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(multiply_mins<T, C>(head, x)), head.dmin, value);
    }
    acc = _mm512_fmadd_ps(value, _mm512_load_ps(x.d), acc);
}

template <_mm_hint where>
inline void prefetch(const void * p, size_t n_bytes) {
    for (size_t i = 0; i < n_bytes; i += 64) {
        _mm_prefetch((const char *) p + i, where);
    }
}

// acc [n / 4][n_quads][column][row] = n rows times n_quads of columns x [n_blocks][n_quads], with C in the last. `fetch`: as
// many bytes of later rows, which come in the meantime at the speed of memory (6 GB/s instead of 25 to 40 if every row's
// block is waited for).
template <class T, int C>
void multiply_rows(const typename T::Block * const * rows, int n, const char * fetch, const Quad<T> * x,
                   int64_t n_blocks, int n_quads, __m512 * acc) {
    using Block = typename T::Block;
    std::fill(acc, acc + n / 4 * n_quads, _mm512_setzero_ps());
    const int last = n_quads - 1;
    for (int64_t kb = 0; kb < n_blocks; ++kb, x += n_quads) {
        __m512 * to = acc;
        for (int first = 0; first < n; first += 4, to += n_quads) {
            const Block * b[4];
            for (int r = 0; r < 4; ++r) {
                b[r] = rows[first + r] + kb;
            }
            const typename T::Head head(b);
            __m512i sums[kQuads][4];
            for (int r = 0; r < 4; r += 2) {
                prefetch<_MM_HINT_T1>(fetch, 2 * sizeof(Block));
                fetch += 2 * sizeof(Block);
                prefetch<_MM_HINT_T0>(b[r] + 1, sizeof(Block));
                prefetch<_MM_HINT_T0>(b[r + 1] + 1, sizeof(Block));
                __m512i codes[2][4];
                T::unpack(*b[r], codes[0]);
                T::unpack(*b[r + 1], codes[1]);
                const __m512i scales[2] = {head.scales(*b[r], r), head.scales(*b[r + 1], r + 1)};
                for (int q = 0; q < last; ++q) {
                    multiply_quad<T, 4>(codes, scales, x[q], sums[q] + r);
                }
                multiply_quad<T, C>(codes, scales, x[last], sums[last] + r);
            }
            for (int q = 0; q < last; ++q) {
                add<T, 4>(head, sums[q], x[q], to[q]);
            }
            add<T, C>(head, sums[last], x[last], to[last]);
        }
    }
}

// ---- the product -------------------------------------------------------------------------------------------------

struct Shape {
    int64_t n_blocks, n_quads;
    bool small; // shared out beforehand, every thread with columns of its own

    explicit Shape(const ggml_tensor * dst) {
        n_blocks = dst->src[0]->ne[0] / QK_K;
        n_quads = (dst->ne[1] + 3) / 4;
        small = is_small_product(dst);
    }
    size_t columns_size() const { return n_blocks * n_quads * sizeof(Quad<kquant::Q6>); } // the largest
};

// Rows [first, first + n), n <= kRows; columns [n_quads / kQuads][n_blocks][kQuads or the rest].
template <class T>
void multiply_group(ggml_tensor * dst, const Shape & shape, const Quad<T> * columns, int64_t first, int n,
                    const char * fetch) {
    using Block = typename T::Block;
    const Block * rows[kRows];
    for (int r = 0; r < kRows; ++r) { // beyond the last row: the last again
        rows[r] = (const Block *) row_of(dst->src[0], first + std::min(r, n - 1));
    }
    const int padded = (int) pad(n, 4);
    for (int64_t q = 0; q < shape.n_quads; q += kQuads, fetch = (const char *) rows[0]) {
        const int n_quads = (int) std::min<int64_t>(kQuads, shape.n_quads - q);
        const int n_columns = (int) std::min<int64_t>(4 * kQuads, dst->ne[1] - 4 * q);
        __m512 acc[kRows / 4 * kQuads];
        const auto multiply = [&](auto go) {
            go(rows, padded, fetch, columns + q * shape.n_blocks, shape.n_blocks, n_quads, acc);
        };
        switch (n_columns % 4) {
        case 0:
            multiply(multiply_rows<T, 4>);
            break;
        case 1:
            multiply(multiply_rows<T, 1>);
            break;
        case 2:
            multiply(multiply_rows<T, 2>);
            break;
        default:
            multiply(multiply_rows<T, 3>);
        }
        for (int c = 0; c < n_columns; ++c) {
            float * to = row_of(dst, 4 * q + c) + first;
            for (int r = 0; r < n; r += 4) {
                const __m128 four = _mm_load_ps((const float *) (acc + r / 4 * n_quads) + 4 * c);
                _mm_mask_storeu_ps(to + r, (__mmask8) ((1 << std::min(4, n - r)) - 1), four);
            }
        }
    }
}

template <class T>
void multiply(const ggml_compute_params * params, ggml_tensor * dst) {
    const Shape shape(dst);
    const size_t size = shape.columns_size();
    auto * columns = (Quad<T> *) (shape.small ? scratch_of(params, size) : shared_scratch(params, size)).base;
    const int64_t n_fills = shape.n_quads * shape.n_blocks, n_groups = (dst->ne[0] + kRows - 1) / kRows;
    const Range fills = shape.small ? Range{0, n_fills} : thread_share(params, n_fills);
    for (int64_t i = fills.begin; i < fills.end; ++i) {
        const int64_t q = i / shape.n_blocks, kb = i % shape.n_blocks, begin = q / kQuads * kQuads;
        const int64_t n = std::min<int64_t>(kQuads, shape.n_quads - begin);
        fill<T>(dst->src[1], kb, 4 * q, (int) std::min<int64_t>(4, dst->ne[1] - 4 * q),
                columns[begin * shape.n_blocks + kb * n + q - begin]);
    }
    // Memory is fastest read in long pieces; of a large product everybody takes the next one.
    const int64_t share = (n_groups + params->nth - 1) / params->nth;
    const int64_t piece = shape.small ? share : std::clamp<int64_t>(share / 8, 1, kPiece);
    if (!shape.small) {
        if (params->ith == 0) {
            ggml_threadpool_chunk_set(params->threadpool, params->nth);
        }
        ggml_barrier(params->threadpool);
    }
    for (int64_t i = params->ith, next; i * piece < n_groups; i = next) {
        next = shape.small ? n_groups : ggml_threadpool_chunk_add(params->threadpool, 1);
        const int64_t end = std::min((i + 1) * piece, n_groups);
        for (int64_t g = i * piece; g < end; ++g) {
            const int64_t then = std::min(g + 1 < end ? g + 1 : next * piece, n_groups - 1);
            multiply_group<T>(dst, shape, columns, g * kRows, (int) std::min<int64_t>(kRows, dst->ne[0] - g * kRows),
                              (const char *) row_of(dst->src[0], then * kRows));
        }
    }
}

} // namespace

size_t ggml_kquant_products_work_size(int n_tasks, const ggml_tensor * dst) {
    const ggml_tensor *src0 = dst->src[0], *src1 = dst->src[1];
    const bool ours = src0->type == GGML_TYPE_Q4_K || src0->type == GGML_TYPE_Q5_K || src0->type == GGML_TYPE_Q6_K;
    if (!ours || src1->type != GGML_TYPE_F32 || src1->nb[0] != sizeof(float) || !ggml_is_matrix(src0) ||
        !ggml_is_matrix(src1) || src0->nb[0] != ggml_type_size(src0->type)) {
        return 0;
    }
    const Shape shape(dst);
    return shape.columns_size() * (shape.small ? n_tasks : 1) + 64;
}

bool ggml_compute_forward_mul_mat_kquants(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->use_ref || ggml_kquant_products_work_size(1, dst) == 0) {
        return false;
    }
    switch (dst->src[0]->type) {
    case GGML_TYPE_Q4_K:
        multiply<kquant::Q4>(params, dst);
        break;
    case GGML_TYPE_Q5_K:
        multiply<kquant::Q5>(params, dst);
        break;
    default:
        multiply<kquant::Q6>(params, dst);
    }
    return true;
}

#else

size_t ggml_kquant_products_work_size(int, const ggml_tensor *) {
    return 0;
}

bool ggml_compute_forward_mul_mat_kquants(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

#endif
