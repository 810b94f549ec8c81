// The tree ops of this fork on CUDA: what the backend calls. Contracts of the ops stand in ggml-tree.h.
#pragma once

#include "common.cuh"

// Whether ggml_cuda_tree_op can compute this node; false also for nodes that are no tree ops.
bool ggml_cuda_tree_op_supported(const ggml_tensor * op);

// Launches the node's kernels on the context's stream. Only for nodes that are supported.
void ggml_cuda_tree_op(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// A stride in bytes as kernels count it.
static inline int64_t floats(size_t stride) {
    return stride / sizeof(float);
}

// one per op
void ggml_cuda_op_ssm_conv_tree(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void ggml_cuda_op_ssm_conv_tree_persist(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void ggml_cuda_op_gated_delta_net_tree(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void ggml_cuda_op_gated_delta_net_tree_persist(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void ggml_cuda_op_tree_mask(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void ggml_cuda_op_block_mask(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void ggml_cuda_op_top_k_logp(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
