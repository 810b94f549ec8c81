// Matrix products of our own, with any number of columns: Q4_K, Q5_K, Q6_K (kquant-gemm.cpp, AVX-512), F32, F16, BF16
// (float-gemm.cpp, AVX2 too). Where these say no (another type, a processor without either) upstream goes on.
#pragma once

#include "ggml.h"

struct ggml_compute_params;

#ifdef __cplusplus
extern "C" {
#endif

// True if the product was computed.
bool ggml_compute_forward_mul_mat_kquants(const struct ggml_compute_params * params, struct ggml_tensor * dst);
bool ggml_compute_forward_mul_mat_floats(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// Work memory that they need; 0 where they will not compute.
size_t ggml_kquant_products_work_size(int n_tasks, const struct ggml_tensor * dst);
size_t ggml_float_products_work_size(int n_tasks, const struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
