// Products of F32, F16 and BF16 weights with any number of columns, on AVX-512 and AVX2.
//
// k lies across the lanes: a tile of a few rows and columns keeps a vector of sums for each pair, and the sums of 16 rows
// are added over their lanes at once (float-lanes.h). The work goes with the true number of columns, and an element of the
// product is summed in one order whatever stands beside it: a plain step, a tree and a prompt get the same bits.
//
// Columns are rounded to the type of the weights first, as upstream does. F16 weights become floats in registers; BF16
// weights are multiplied as they are, two k at a time, where the processor can, and else become floats too.
//
// Bytes moved: weights once. Bound: 16 products an instruction, 32 of BF16; 8 on AVX2.
//
// Refuses nothing: what it does not do it leaves to upstream.
#include "weight-products.h"

#include "float-lanes.h"

#if defined(PF_FLOAT_LANES)

#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "tree-work.h"

#include <algorithm>

namespace {

constexpr int kRows = 16;  // summed at a time
constexpr int kSoon = 256; // bytes ahead in a row, fetched into the first-level cache
constexpr bool kWide = PF_FLOAT_LANES == 16;

// Rows of a tile of so many columns: with their sums, the columns and a row all lie in registers, 32 or 16 of them.
constexpr int rows_of_tile(int columns) {
    return columns <= (kWide ? 3 : 1) ? 8 : 4;
}

// ---- formats -----------------------------------------------------------------------------------------------------

// A vector of F::n k is n_bytes of weights. Columns in floats:
struct Real {
    using Column = float;
    static constexpr int n = PF_FLOAT_LANES;
    static tree_vec column(const float * x) { return tree_vec_load(x); }
    static tree_vec multiply(tree_vec sum, tree_vec a, tree_vec b) { return tree_vec_fma(sum, a, b); }
};

struct F32 : Real {
    static constexpr int max_columns = kWide ? 6 : 3;
    static constexpr int n_bytes = 4 * n;
    static tree_vec weights(const char * p) { return tree_vec_load((const float *) p); }
    static void round(const float * x, float * to) { tree_vec_store(to, tree_vec_load(x)); }
};

struct F16 : Real {
    static constexpr int max_columns = 3; // twice as many with half the rows turn as many weights into floats
    static constexpr int n_bytes = 2 * n;
    static tree_vec weights(const char * p) { return lanes_of_f16(p); }
    static void round(const float * x, float * to) { tree_vec_store(to, rounded_to_f16(tree_vec_load(x))); }
};

#if defined(__AVX512BF16__)

struct BF16 {
    using Column = ggml_bf16_t;
    static constexpr int n = 32;
    static constexpr int max_columns = 6;
    static constexpr int n_bytes = 64;
    static tree_vec weights(const char * p) { return tree_vec_load((const float *) p); }
    static tree_vec column(const ggml_bf16_t * x) { return tree_vec_load((const float *) x); }
    static tree_vec multiply(tree_vec sum, tree_vec a, tree_vec b) {
        return _mm512_dpbf16_ps(sum, (__m512bh) a, (__m512bh) b);
    }
    static void round(const float * x, ggml_bf16_t * to) {
        const __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 16), _mm512_loadu_ps(x));
        _mm512_storeu_si512(to, (__m512i) rounded);
    }
};

#else

struct BF16 : Real {
    static constexpr int max_columns = 3;
    static constexpr int n_bytes = 2 * n;
    static tree_vec weights(const char * p) { return lanes_of_bf16(p); }
    static void round(const float * x, float * to) {
        for (int i = 0; i < n; ++i) {
            to[i] = GGML_BF16_TO_FP32(GGML_FP32_TO_BF16(x[i]));
        }
    }
};

#endif

// ---- columns -----------------------------------------------------------------------------------------------------

// As a format has them. Their stride is an odd number of lines: columns 4 KiB apart would share a few lines of the cache.
template <class F>
struct Columns {
    using Column = typename F::Column;
    static constexpr int64_t per_line = 64 / sizeof(Column);
    int64_t n, k, stride;
    Column * data = nullptr; // [n][stride]

    Columns(const ggml_tensor * src1, Scratch & scratch)
        : n(src1->ne[1]), k(src1->ne[0]), stride((pad(k, per_line) / per_line | 1) * per_line) {
        data = scratch.take<Column>(n * stride);
    }
    void round(const ggml_tensor * src1, Range which) {
        for (int64_t c = which.begin; c < which.end; ++c) {
            for (int64_t i = 0; i < k; i += F::n) {
                F::round(row_of(src1, c) + i, data + c * stride + i);
            }
        }
    }
};

// ---- a tile ------------------------------------------------------------------------------------------------------

// Rows that a later turn multiplies, of which some are fetched meanwhile: they come at the speed of memory, where else every
// row's beginning would be waited for.
struct Fetch {
    const char * rows;
    int first, last;

    // What to fetch while row r is multiplied.
    const char * beside(int r, const char * const * row) const {
        return rows && first <= r && r < last ? rows + (row[r] - row[0]) : nullptr;
    }
};

// sums[c * kRows / 4 + r / 4]: rows r to r + 3 times column c, unfinished.
template <class F, int rows, int columns>
void multiply_tile(const char * const * row, const char * fetch, const typename F::Column * x, int64_t stride,
                   int64_t k, tree_vec * sums) {
    tree_vec sum[columns][rows];
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) {
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            sum[c][r] = tree_vec_zero;
        }
    }
    int64_t at = 0;
    for (int64_t i = 0; i < k; i += F::n, at += F::n_bytes) {
        if (fetch) {
            for (int b = 0; b < rows * F::n_bytes; b += 64, fetch += 64) {
                _mm_prefetch(fetch, _MM_HINT_T1);
            }
        }
        tree_vec column[columns];
#pragma GCC unroll 8
        for (int c = 0; c < columns; ++c) {
            column[c] = F::column(x + c * stride + i);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const tree_vec weights = F::weights(row[r] + at);
            _mm_prefetch(row[r] + at + kSoon, _MM_HINT_T0);
#pragma GCC unroll 8
            for (int c = 0; c < columns; ++c) {
                sum[c][r] = F::multiply(sum[c][r], weights, column[c]);
            }
        }
    }
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) {
#pragma GCC unroll 8
        for (int r = 0; r < rows; r += 4) {
            sums[(c * kRows + r) / 4] = sums_of_four(sum[c] + r);
        }
    }
}

// Up to kRows rows times so many columns.
template <class F, int columns>
void multiply_columns(int n, const char * const * row, Fetch fetch, const Columns<F> & x, int64_t first, float * dst,
                      int64_t ldd) {
    constexpr int rows = rows_of_tile(columns);
    tree_vec sums[columns * kRows / 4] = {}; // beyond the last row: nothing
    for (int r = 0; r < n; r += rows) {
        multiply_tile<F, rows, columns>(row + r, fetch.beside(r, row), x.data + first * x.stride, x.stride, x.k,
                                        sums + r / 4);
    }
    for (int c = 0; c < columns; ++c) {
        store_sums(dst + c * ldd, n, sums + c * kRows / 4);
    }
}

template <class F, int columns = F::max_columns>
void multiply_last(int n_columns, int n, const char * const * row, const Columns<F> & x, Fetch fetch, int64_t first,
                   float * dst, int64_t ldd) {
    if constexpr (columns > 0) {
        if (n_columns == columns) {
            multiply_columns<F, columns>(n, row, fetch, x, first, dst, ldd);
        } else {
            multiply_last<F, columns - 1>(n_columns, n, row, x, fetch, first, dst, ldd);
        }
    }
}

// ---- the product -------------------------------------------------------------------------------------------------

template <class F>
size_t work_size(int n_tasks, const ggml_tensor * dst) {
    Scratch count{nullptr};
    Columns<F>(dst->src[1], count);
    return count.used * (is_small_product(dst) ? n_tasks : 1);
}

// Rows go to threads by 16. A small product is shared out beforehand, and every thread rounds all columns for itself; of a
// large one everybody takes what is next.
template <class F>
void multiply(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor *src0 = dst->src[0], *src1 = dst->src[1];
    const bool small = is_small_product(dst);
    const size_t size = work_size<F>(1, dst);
    Scratch scratch = small ? scratch_of(params, size) : shared_scratch(params, size);
    Columns<F> x(src1, scratch);
    const int64_t n_groups = (dst->ne[0] + kRows - 1) / kRows;
    Range groups{params->ith, n_groups};
    if (small) {
        groups = thread_share(params, n_groups);
        x.round(src1, {0, x.n});
    } else {
        x.round(src1, thread_share(params, x.n));
        if (params->ith == 0) {
            ggml_threadpool_chunk_set(params->threadpool, params->nth);
        }
        ggml_barrier(params->threadpool);
    }
    const auto row = [&](int64_t i) { return (const char *) src0->data + std::min(i, dst->ne[0] - 1) * src0->nb[1]; };
    for (int64_t i = groups.begin; i < groups.end;) {
        const int64_t next = small ? i + 1 : ggml_threadpool_chunk_add(params->threadpool, 1);
        const char * rows[kRows]; // beyond the last: the last again
        for (int r = 0; r < kRows; ++r) {
            rows[r] = row(i * kRows + r);
        }
        // With columns for two turns or more, half in the first and half in the second.
        Fetch fetch{next < groups.end ? row(next * kRows) : nullptr, 0, x.n <= F::max_columns ? kRows : kRows / 2};
        for (int64_t c = 0; c < x.n; c += F::max_columns, fetch.first = fetch.last, fetch.last += kRows / 2) {
            multiply_last<F>((int) std::min<int64_t>(F::max_columns, x.n - c),
                             (int) std::min<int64_t>(kRows, dst->ne[0] - i * kRows), rows, x, fetch, c,
                             row_of(dst, c) + i * kRows, dst->nb[1] / sizeof(float));
        }
        i = next;
    }
}

bool fits(const ggml_tensor * dst, int n) {
    const ggml_tensor *src0 = dst->src[0], *src1 = dst->src[1];
    return src1->type == GGML_TYPE_F32 && src1->nb[0] == sizeof(float) && ggml_is_matrix(src0) &&
           ggml_is_matrix(src1) && src0->nb[0] == ggml_type_size(src0->type) && src0->ne[0] % n == 0;
}

} // namespace

size_t ggml_float_products_work_size(int n_tasks, const ggml_tensor * dst) {
    switch (dst->src[0]->type) {
    case GGML_TYPE_F32:
        return fits(dst, F32::n) ? work_size<F32>(n_tasks, dst) + 64 : 0;
    case GGML_TYPE_F16:
        return fits(dst, F16::n) ? work_size<F16>(n_tasks, dst) + 64 : 0;
    case GGML_TYPE_BF16:
        return fits(dst, BF16::n) ? work_size<BF16>(n_tasks, dst) + 64 : 0;
    default:
        return 0;
    }
}

bool ggml_compute_forward_mul_mat_floats(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->use_ref || ggml_float_products_work_size(1, dst) == 0) {
        return false;
    }
    switch (dst->src[0]->type) {
    case GGML_TYPE_F32:
        multiply<F32>(params, dst);
        break;
    case GGML_TYPE_F16:
        multiply<F16>(params, dst);
        break;
    default:
        multiply<BF16>(params, dst);
    }
    return true;
}

#else

size_t ggml_float_products_work_size(int, const ggml_tensor *) {
    return 0;
}

bool ggml_compute_forward_mul_mat_floats(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

#endif
