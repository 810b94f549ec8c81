// F32, F16 and BF16 weights in panel-gemm.h, on AVX-512.
//
// Columns are rounded to the type of the weights, as upstream does for one column, so that a pass over a tree and one over
// a token multiply the same numbers. F32 rows are read where they lie, F16 rows become floats in the first-level cache;
// BF16 rows are multiplied as they are, two k at a time, where the processor can, and else become floats too.
//
// Bytes moved: weights once. Bound: 16 products an instruction, 32 of BF16.
//
// Refuses nothing: what it does not do it leaves to upstream.
#include "panel-products.h"

#if defined(__AVX512F__) && defined(__AVX512VL__) && defined(__AVX512BW__) && defined(__AVX512DQ__)

#include "ggml-cpu.h"
#include "panel-gemm.h"

namespace {

// Block kb of a column, as its type's numbers.
void round_to(ggml_type type, const float * x, float * to) {
    if (type == GGML_TYPE_F16) {
        for (int i = 0; i < kBlock; i += 16) {
            const __m256i half = _mm512_cvtps_ph(_mm512_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
            _mm512_storeu_ps(to + i, _mm512_cvtph_ps(half));
        }
    } else if (type == GGML_TYPE_BF16) {
        ggml_bf16_t rounded[kBlock];
        ggml_cpu_fp32_to_bf16(x, rounded, kBlock);
        ggml_cpu_bf16_to_fp32(rounded, to, kBlock);
    } else {
        memcpy(to, x, kBlock * sizeof(float));
    }
}

template <ggml_type type>
struct Floats {
    struct Panel {
        alignas(64) float x[kBlock * 16]; // [k][column]
    };
    struct Weights {
        alignas(64) float unpacked[type == GGML_TYPE_F32 ? 1 : kRows][kBlock];
        const float * row[kRows];
    };
    static void fill_panel(const ggml_tensor * src1, int64_t kb, int64_t first, int n, int width, Panel * panel) {
        alignas(64) float columns[16][kBlock];
        for (int c = 0; c < width; ++c) {
            if (c < n) {
                round_to(type, row_of(src1, first + c) + kb * kBlock, columns[c]);
            } else {
                memset(columns[c], 0, sizeof columns[c]);
            }
        }
        tree_transpose(width, kBlock, columns[0], kBlock, panel->x, width);
    }
    static void unpack(const char * row, int64_t kb, Weights & w, int r) {
        if (type == GGML_TYPE_F32) {
            w.row[r] = (const float *) row + kb * kBlock;
            return;
        }
        const uint16_t * from = (const uint16_t *) row + kb * kBlock;
        for (int i = 0; i < kBlock; i += 16) {
            const __m256i x = _mm256_loadu_si256((const __m256i *) (from + i));
            const __m512 real = type == GGML_TYPE_F16
                                    ? _mm512_cvtph_ps(x)
                                    : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
            _mm512_store_ps(w.unpacked[r] + i, real);
        }
        w.row[r] = w.unpacked[r];
    }
    template <class V>
    static void multiply(const Weights & w, int first, const Panel & panel, float * acc, int64_t ld) {
        typename V::Float sum[kTile];
        const float * row[kTile];
        for (int r = 0; r < kTile; ++r) {
            sum[r] = V::load_real(acc + r * ld);
            row[r] = w.row[first + r];
        }
#pragma GCC unroll 4
        for (int k = 0; k < kBlock; ++k) {
            const typename V::Float x = V::load_real(panel.x + k * V::n);
            for (int r = 0; r < kTile; ++r) {
                sum[r] = V::add_product(sum[r], V::all(row[r][k]), x);
            }
        }
        for (int r = 0; r < kTile; ++r) {
            V::store(acc + r * ld, sum[r]);
        }
    }
};

#if defined(__AVX512BF16__)

struct Pairs { // of BF16
    struct Panel {
        alignas(64) ggml_bf16_t x[kBlock * 16]; // [k / 2][column][2]
    };
    struct Weights {
        const char * row[kRows];
    };
    static void fill_panel(const ggml_tensor * src1, int64_t kb, int64_t first, int n, int width, Panel * panel) {
        alignas(64) float columns[16][kBlock / 2]; // a pair in each
        memset(columns, 0, sizeof columns);
        for (int c = 0; c < n; ++c) {
            ggml_cpu_fp32_to_bf16(row_of(src1, first + c) + kb * kBlock, (ggml_bf16_t *) columns[c], kBlock);
        }
        tree_transpose(width, kBlock / 2, columns[0], kBlock / 2, (float *) panel->x, width);
    }
    static void unpack(const char * row, int64_t kb, Weights & w, int r) {
        w.row[r] = row + kb * kBlock * sizeof(ggml_bf16_t);
    }
    template <class V>
    static void multiply(const Weights & w, int first, const Panel & panel, float * acc, int64_t ld) {
        typename V::Float sum[kTile];
        const char * row[kTile];
        for (int r = 0; r < kTile; ++r) {
            sum[r] = V::load_real(acc + r * ld);
            row[r] = w.row[first + r];
        }
#pragma GCC unroll 4
        for (int k = 0; k < kBlock / 2; ++k) {
            const typename V::Int x = V::load(panel.x + 2 * k * V::n);
            for (int r = 0; r < kTile; ++r) {
                sum[r] = V::dot_bf16(sum[r], x, V::all(word_at(row[r] + 4 * k)));
            }
        }
        for (int r = 0; r < kTile; ++r) {
            V::store(acc + r * ld, sum[r]);
        }
    }
};
using BF16 = Pairs;

#else
using BF16 = Floats<GGML_TYPE_BF16>;
#endif

} // namespace

size_t ggml_float_panels_work_size(int n_tasks, const ggml_tensor * dst) {
    const ggml_type type = dst->src[0]->type;
    const bool ours = type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
    return ours && panels_fit(dst) ? panel_work_size<Floats<GGML_TYPE_F16>>(n_tasks, dst) : 0; // the largest of all
}

bool ggml_compute_forward_mul_mat_float_panels(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->use_ref || ggml_float_panels_work_size(1, dst) == 0) {
        return false;
    }
    switch (dst->src[0]->type) {
    case GGML_TYPE_F32:
        multiply_panels<Floats<GGML_TYPE_F32>>(params, dst);
        break;
    case GGML_TYPE_F16:
        multiply_panels<Floats<GGML_TYPE_F16>>(params, dst);
        break;
    default:
        multiply_panels<BF16>(params, dst);
    }
    return true;
}

#else

size_t ggml_float_panels_work_size(int, const ggml_tensor *) {
    return 0;
}

bool ggml_compute_forward_mul_mat_float_panels(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

#endif
