// Small f32 matrix products for the tree ops, on ggml's SIMD macros.
//
// Owns: register-blocked products with a freely strided left factor, tables of dot products, transposition. Every element is
// summed in the same order wherever its block lies, so results do not depend on how threads cut the work.
// Refuses: ragged widths. The columns of a product and the length of a dot product are multiples of tree_vec_len.
#pragma once

#include "vec.h"

#include <cstdint>

#if defined(GGML_SIMD) && !defined(__ARM_FEATURE_SVE) && !defined(__riscv_v_intrinsic)

#define tree_vec GGML_F32_VEC
#define tree_vec_zero GGML_F32_VEC_ZERO
#define tree_vec_set1 GGML_F32_VEC_SET1
#define tree_vec_load GGML_F32_VEC_LOAD
#define tree_vec_store GGML_F32_VEC_STORE
#define tree_vec_fma GGML_F32_VEC_FMA // a + b*c
#define tree_vec_mul GGML_F32_VEC_MUL
static constexpr int tree_vec_len = GGML_F32_EPR;

static inline float tree_vec_sum(tree_vec v) {
    tree_vec parts[GGML_F32_ARR] = {v};
    for (int i = 1; i < GGML_F32_ARR; ++i) {
        parts[i] = tree_vec_zero;
    }
    float sum;
    GGML_F32_VEC_REDUCE(sum, parts);
    return sum;
}

#else // sizeless or no vectors: plain loops that the compiler may widen

static constexpr int tree_vec_len = 8;
struct tree_vec {
    float x[tree_vec_len];
};
static const tree_vec tree_vec_zero = {};

static inline tree_vec tree_vec_set1(float s) {
    tree_vec r;
    for (float & x : r.x) {
        x = s;
    }
    return r;
}
static inline tree_vec tree_vec_load(const float * p) {
    tree_vec r;
    for (int i = 0; i < tree_vec_len; ++i) {
        r.x[i] = p[i];
    }
    return r;
}
static inline void tree_vec_store(float * p, const tree_vec & a) {
    for (int i = 0; i < tree_vec_len; ++i) {
        p[i] = a.x[i];
    }
}
static inline tree_vec tree_vec_fma(tree_vec a, const tree_vec & b, const tree_vec & c) {
    for (int i = 0; i < tree_vec_len; ++i) {
        a.x[i] += b.x[i] * c.x[i];
    }
    return a;
}
static inline tree_vec tree_vec_mul(tree_vec a, const tree_vec & b) {
    for (int i = 0; i < tree_vec_len; ++i) {
        a.x[i] *= b.x[i];
    }
    return a;
}
static inline float tree_vec_sum(const tree_vec & v) {
    float sum = 0.0f;
    for (float x : v.x) {
        sum += x;
    }
    return sum;
}

#endif

// Accumulators of a tile are rows x 2 vectors; they must fit the register file beside the two columns and a broadcast.
#if defined(__AVX512F__) || defined(__ARM_NEON)
static constexpr int tree_tile_rows = 8;
static constexpr int tree_long_rows = 2; // rows of a tile of 8 vectors
#else
static constexpr int tree_tile_rows = 6;
static constexpr int tree_long_rows = 1;
#endif
static constexpr int tree_panel = 2 * tree_vec_len; // columns of a tile

// The left factor of a product: element (row, t) at data[row*row_stride + t*t_stride].
struct TreeLeft {
    const float * data;
    int64_t row_stride;
    int64_t t_stride;
};

// C[rows x cols vectors] = scale C + A B over n_t terms; scale 0 overwrites. Unless told to unroll, gcc 12 writes the
// accumulators to memory in every turn.
template <int rows, int cols>
static inline void tree_tile(TreeLeft a, const float * b, int64_t ldb, int n_t, float scale, float * c, int64_t ldc) {
    tree_vec acc[rows][cols];
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < cols; ++j) {
            acc[i][j] = scale == 0.0f
                            ? tree_vec_zero
                            : tree_vec_mul(tree_vec_load(c + i * ldc + j * tree_vec_len), tree_vec_set1(scale));
        }
    }
    for (int t = 0; t < n_t; ++t) {
        tree_vec bt[cols];
#pragma GCC unroll 8
        for (int j = 0; j < cols; ++j) {
            bt[j] = tree_vec_load(b + t * ldb + j * tree_vec_len);
        }
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) {
            const tree_vec ai = tree_vec_set1(a.data[i * a.row_stride + t * a.t_stride]);
#pragma GCC unroll 8
            for (int j = 0; j < cols; ++j) {
                acc[i][j] = tree_vec_fma(acc[i][j], bt[j], ai);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < cols; ++j) {
            tree_vec_store(c + i * ldc + j * tree_vec_len, acc[i][j]);
        }
    }
}

template <int rows, int cols>
static inline void tree_last_rows(int m, TreeLeft a, const float * b, int64_t ldb, int n_t, float scale, float * c,
                                  int64_t ldc) {
    if constexpr (rows > 0) {
        if (m == rows) {
            tree_tile<rows, cols>(a, b, ldb, n_t, scale, c, ldc);
        } else {
            tree_last_rows<rows - 1, cols>(m, a, b, ldb, n_t, scale, c, ldc);
        }
    }
}

static inline void tree_prefetch(const float * p, int64_t n) {
#if defined(__GNUC__) || defined(__clang__)
    for (int64_t i = 0; i < n; i += 16) {
        __builtin_prefetch(p + i);
    }
#else
    GGML_UNUSED(p);
    GGML_UNUSED(n);
#endif
}

template <int cols>
static void tree_gemm_panel(int m, TreeLeft a, const float * b, int64_t ldb, int n_t, float scale, float * c,
                            int64_t ldc, bool fetch_a) {
    for (; m >= tree_tile_rows; m -= tree_tile_rows) {
        if (fetch_a) {
            tree_prefetch(a.data + 2 * tree_tile_rows * a.row_stride, tree_tile_rows * a.row_stride);
        }
        tree_tile<tree_tile_rows, cols>(a, b, ldb, n_t, scale, c, ldc);
        a.data += tree_tile_rows * a.row_stride;
        c += tree_tile_rows * ldc;
    }
    tree_last_rows<tree_tile_rows - 1, cols>(m, a, b, ldb, n_t, scale, c, ldc);
}

// C[m x n] = scale C + A B over n_t terms, n a multiple of tree_vec_len; scale 0 overwrites.
// B's row t starts at b + t*ldb, and its column panel p (tree_panel columns) lies panel_stride further than panel p-1:
// tree_panel for a plain row-major matrix. fetch_a says that A's rows follow each other and lie in memory, not in the
// cache: fetching them ahead saves a sixth of the time at 8 to 16 nodes.
static inline void tree_gemm(int m, int n, int n_t, TreeLeft a, const float * b, int64_t ldb, int64_t panel_stride,
                             float scale, float * c, int64_t ldc, bool fetch_a = false) {
    int j = 0;
    for (; j + tree_panel <= n; j += tree_panel, b += panel_stride) {
        tree_gemm_panel<2>(m, a, b, ldb, n_t, scale, c + j, ldc, fetch_a && j == 0);
    }
    if (j < n) {
        tree_gemm_panel<1>(m, a, b, ldb, n_t, scale, c + j, ldc, fetch_a && j == 0);
    }
}

// The same for a C that lies in memory and an n_t so small that moving C is the cost: C is walked in long rows, once.
// m is even and B plain row-major. Against tree_gemm: half the time at n_t = 1, a quarter less at 16, more at 64.
static inline void tree_gemm_by_rows(int m, int n, int n_t, TreeLeft a, const float * b, int64_t ldb, float scale,
                                     float * c, int64_t ldc) {
    constexpr int rows = tree_long_rows;
    for (int i = 0; i < m; i += rows, a.data += rows * a.row_stride, c += rows * ldc) {
        int j = 0;
        for (; j + 8 * tree_vec_len <= n; j += 8 * tree_vec_len) {
            tree_tile<rows, 8>(a, b + j, ldb, n_t, scale, c + j, ldc);
        }
        for (; j + 2 * tree_vec_len <= n; j += 2 * tree_vec_len) {
            tree_tile<rows, 2>(a, b + j, ldb, n_t, scale, c + j, ldc);
        }
        for (; j < n; j += tree_vec_len) {
            tree_tile<rows, 1>(a, b + j, ldb, n_t, scale, c + j, ldc);
        }
    }
}

// dst[j][i] = x_i . y_j, for x [m, n] and y [k, n], k even, rows of n floats. For few y: each dot product ends in a sum
// over lanes. x is read once, row after row, which memory delivers twice as fast as several rows abreast.
static inline void tree_dots(int m, int k, int n, const float * x, const float * y, float * dst, int64_t ldd) {
    for (int i = 0; i < m; ++i, x += n) {
        for (int j = 0; j < k; j += 2) {
            const float * y0 = y + j * n;
            tree_vec a = tree_vec_zero;
            tree_vec b = tree_vec_zero;
            for (int t = 0; t < n; t += tree_vec_len) {
                const tree_vec xt = tree_vec_load(x + t);
                a = tree_vec_fma(a, xt, tree_vec_load(y0 + t));
                b = tree_vec_fma(b, xt, tree_vec_load(y0 + n + t));
            }
            dst[j * ldd + i] = tree_vec_sum(a);
            dst[(j + 1) * ldd + i] = tree_vec_sum(b);
        }
    }
}

// dst[j][i] = src[i][j], in 4 x 4 blocks that compilers turn into shuffles
static inline void tree_transpose(int rows, int cols, const float * src, int64_t lds, float * dst, int64_t ldd) {
    int i = 0;
    for (; i + 4 <= rows; i += 4) {
        const float * s = src + i * lds;
        int j = 0;
        for (; j + 4 <= cols; j += 4) {
            float block[4][4];
            for (int a = 0; a < 4; ++a) {
                for (int b = 0; b < 4; ++b) {
                    block[b][a] = s[a * lds + j + b];
                }
            }
            for (int b = 0; b < 4; ++b) {
                for (int a = 0; a < 4; ++a) {
                    dst[(j + b) * ldd + i + a] = block[b][a];
                }
            }
        }
        for (; j < cols; ++j) {
            for (int a = 0; a < 4; ++a) {
                dst[j * ldd + i + a] = s[a * lds + j];
            }
        }
    }
    for (; i < rows; ++i) {
        for (int j = 0; j < cols; ++j) {
            dst[j * ldd + i] = src[i * lds + j];
        }
    }
}
