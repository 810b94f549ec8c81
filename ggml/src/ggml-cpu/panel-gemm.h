// Products of weights with 2 to any number of columns on AVX-512, the weights as the file has them.
//
// A pass over a tree multiplies every weight with a few columns: too many to unpack a block for each of them, too few to
// earn back a copy of the weights in another order. So a block of 16 rows is unpacked once, into the first-level cache, and
// meets all columns there. Columns are laid out in panels so that one vector holds the same k of 16 columns (of 8 where no
// more are left); it is multiplied with one weight in all its lanes, and no lane is ever added to another.
//
// Owns: the walk over rows, blocks and panels, who does what, the words for vectors of 16 and 8 columns. A format (see
// kquant-gemm.cpp, float-gemm.cpp) says how a panel is filled, a row unpacked, a tile multiplied. The order of sums depends
// neither on threads nor on the number of columns.
#pragma once

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "tree-gemm.h"
#include "tree-work.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

constexpr int kRows = 16;   // unpacked at a time
constexpr int kTile = 8;    // of these in registers
constexpr int kBlock = 256; // k of a block, and of a panel

// The words of a tile, for vectors of 16 and of 8 columns.
struct Wide {
    using Int = __m512i;
    using Float = __m512;
    static constexpr int n = 16;
    static Int zero() { return _mm512_setzero_si512(); }
    static Int load(const void * p) { return _mm512_load_si512(p); }
    static Int all(int32_t x) { return _mm512_set1_epi32(x); }
    static Float all(float x) { return _mm512_set1_ps(x); }
#if defined(__AVX512VNNI__)
    static Int dot8(Int sum, Int codes, Int columns) { return _mm512_dpbusd_epi32(sum, codes, columns); }
    static Int dot16(Int sum, Int a, Int b) { return _mm512_dpwssd_epi32(sum, a, b); }
#endif
    static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
    static Int sub_32(Int a, Int b) { return _mm512_sub_epi32(a, _mm512_slli_epi32(b, 5)); }
    static Int mul(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
    static Float real(Int a) { return _mm512_cvtepi32_ps(a); }
    static Float load_real(const float * p) { return _mm512_load_ps(p); }
    static void store(float * p, Float a) { _mm512_store_ps(p, a); }
    static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
    static Float add_product(Float sum, Float a, Float b) { return _mm512_fmadd_ps(a, b, sum); }
#if defined(__AVX512BF16__)
    static Float dot_bf16(Float sum, Int a, Int b) { return _mm512_dpbf16_ps(sum, (__m512bh) a, (__m512bh) b); }
#endif
    static Float sub_product(Float sum, Float a, Float b) { return _mm512_fnmadd_ps(a, b, sum); }
};
struct Narrow {
    using Int = __m256i;
    using Float = __m256;
    static constexpr int n = 8;
    static Int zero() { return _mm256_setzero_si256(); }
    static Int load(const void * p) { return _mm256_load_si256((const __m256i *) p); }
    static Int all(int32_t x) { return _mm256_set1_epi32(x); }
    static Float all(float x) { return _mm256_set1_ps(x); }
#if defined(__AVX512VNNI__)
    static Int dot8(Int sum, Int codes, Int columns) { return _mm256_dpbusd_epi32(sum, codes, columns); }
    static Int dot16(Int sum, Int a, Int b) { return _mm256_dpwssd_epi32(sum, a, b); }
#endif
    static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
    static Int sub_32(Int a, Int b) { return _mm256_sub_epi32(a, _mm256_slli_epi32(b, 5)); }
    static Int mul(Int a, Int b) { return _mm256_mullo_epi32(a, b); }
    static Float real(Int a) { return _mm256_cvtepi32_ps(a); }
    static Float load_real(const float * p) { return _mm256_load_ps(p); }
    static void store(float * p, Float a) { _mm256_store_ps(p, a); }
    static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
    static Float add_product(Float sum, Float a, Float b) { return _mm256_fmadd_ps(a, b, sum); }
#if defined(__AVX512BF16__)
    static Float dot_bf16(Float sum, Int a, Int b) { return _mm256_dpbf16_ps(sum, (__m256bh) a, (__m256bh) b); }
#endif
    static Float sub_product(Float sum, Float a, Float b) { return _mm256_fnmadd_ps(a, b, sum); }
};

static inline int32_t word_at(const void * p) {
    int32_t word;
    memcpy(&word, p, sizeof word);
    return word;
}

// ---- the product -------------------------------------------------------------------------------------------------

struct PanelShape {
    int64_t n_blocks; // of k
    int64_t n_tiles;  // of 16 columns
    int64_t n_padded; // columns of an accumulator's row
    bool last_narrow; // the last tile has no more than 8 columns

    explicit PanelShape(const ggml_tensor * dst) {
        const int64_t n = dst->ne[1];
        n_blocks = dst->src[0]->ne[0] / kBlock;
        n_tiles = (n + 15) / 16;
        n_padded = 16 * n_tiles;
        last_narrow = n_padded - n >= 8;
    }
};

template <class F>
struct PanelWork {
    typename F::Panel * panels; // [n_tiles][n_blocks], of all threads
    typename F::Weights * weights;
    float * acc; // [kRows][n_padded]

    PanelWork(Scratch & s, const PanelShape & shape, int ith, int nth) {
        panels = s.take<typename F::Panel>(shape.n_tiles * shape.n_blocks);
        weights = s.take<typename F::Weights>(nth);
        acc = s.take<float>(nth * kRows * shape.n_padded);
        if (s.base) {
            weights += ith;
            acc += ith * kRows * shape.n_padded;
        }
    }
};

template <class F>
static size_t panel_work_size(int n_tasks, const ggml_tensor * dst) {
    Scratch count{nullptr};
    PanelWork<F>(count, PanelShape(dst), 0, n_tasks);
    return count.used + 64;
}

// Weights that will be unpacked next, in pieces: fetched one by one between products they come at the speed of memory,
// where unpacking would wait for every row of a block (6 GB/s instead of 25).
struct Fetch {
    const char * at;
    const char * end;
    size_t piece;

    void next() {
        const char * stop = std::min(at + piece, end);
        for (; at < stop; at += 64) {
            _mm_prefetch(at, _MM_HINT_T1);
        }
    }
};

// Rows [first, first + n), n <= kRows.
template <class F>
static void multiply_rows(ggml_tensor * dst, const PanelShape & shape, const PanelWork<F> & work, int64_t first, int n,
                          Fetch fetch) {
    const ggml_tensor * src0 = dst->src[0];
    const char * row = (const char *) src0->data + first * src0->nb[1];
    typename F::Weights & w = *work.weights;
    memset(work.acc, 0, kRows * shape.n_padded * sizeof(float));
    for (int64_t kb = 0; kb < shape.n_blocks; ++kb) {
        for (int r = 0; r < (int) pad(n, kTile); ++r) { // beyond the last row: the last again
            F::unpack(row + std::min(r, n - 1) * src0->nb[1], kb, w, r);
        }
        for (int64_t t = 0; t < shape.n_tiles; ++t) {
            const typename F::Panel & panel = work.panels[t * shape.n_blocks + kb];
            for (int r = 0; r < n; r += kTile) {
                float * acc = work.acc + r * shape.n_padded + 16 * t;
                fetch.next();
                if (shape.last_narrow && t == shape.n_tiles - 1) {
                    F::template multiply<Narrow>(w, r, panel, acc, shape.n_padded);
                } else {
                    F::template multiply<Wide>(w, r, panel, acc, shape.n_padded);
                }
            }
        }
    }
    tree_transpose(n, (int) dst->ne[1], work.acc, shape.n_padded, (float *) dst->data + first,
                   dst->nb[1] / sizeof(float));
}

template <class F>
static void multiply_panels(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor *src0 = dst->src[0], *src1 = dst->src[1];
    const PanelShape shape(dst);
    Scratch scratch = shared_scratch(params, panel_work_size<F>(params->nth, dst) - 64);
    const PanelWork<F> work(scratch, shape, params->ith, params->nth);

    const Range panels = thread_share(params, shape.n_tiles * shape.n_blocks);
    for (int64_t i = panels.begin; i < panels.end; ++i) {
        const int64_t t = i / shape.n_blocks;
        F::fill_panel(src1, i % shape.n_blocks, 16 * t, (int) std::min<int64_t>(16, dst->ne[1] - 16 * t),
                      shape.last_narrow && t == shape.n_tiles - 1 ? 8 : 16, work.panels + i);
    }
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    const int64_t n_groups = (dst->ne[0] + kRows - 1) / kRows;
    const auto group = [&](int64_t i) {
        return (const char *) src0->data + std::min(std::min(i, n_groups) * kRows, dst->ne[0]) * src0->nb[1];
    };
    const size_t piece = pad(kRows * src0->nb[1] / (2 * shape.n_blocks * shape.n_tiles), 64);
    for (int64_t i = params->ith; i < n_groups;) {
        const int64_t next = ggml_threadpool_chunk_add(params->threadpool, 1);
        multiply_rows<F>(dst, shape, work, i * kRows, (int) std::min<int64_t>(kRows, dst->ne[0] - i * kRows),
                         {group(next), group(next + 1), piece});
        i = next;
    }
}

// What all formats ask of a product.
static inline bool panels_fit(const ggml_tensor * dst) {
    const ggml_tensor *src0 = dst->src[0], *src1 = dst->src[1];
    return src1->type == GGML_TYPE_F32 && src1->nb[0] == sizeof(float) && ggml_is_matrix(src0) &&
           ggml_is_matrix(src1) && src0->nb[0] == ggml_type_size(src0->type) && src0->ne[0] % kBlock == 0 &&
           src1->ne[1] >= 2;
}
