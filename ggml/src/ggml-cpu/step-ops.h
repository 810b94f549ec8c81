// The ops of ggml-tree.h that keep a decode step on its device, on the CPU: attention masks and the likeliest tokens.
#pragma once

#include "ggml-cpu-impl.h"

void ggml_compute_forward_tree_mask(const ggml_compute_params * params, ggml_tensor * dst);
void ggml_compute_forward_block_mask(const ggml_compute_params * params, ggml_tensor * dst);
void ggml_compute_forward_top_k_logp(const ggml_compute_params * params, ggml_tensor * dst);
size_t ggml_top_k_logp_work_size(const ggml_tensor * dst); // bytes, for all threads together
