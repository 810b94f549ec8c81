// The tree ops (ggml-tree.h) on the CPU: what ggml-cpu.c calls. For tensors made by the builders of ggml-tree.h only.
#pragma once

#include "ggml-cpu-impl.h"

#ifdef __cplusplus
extern "C" {
#endif

size_t ggml_tree_op_work_size(const struct ggml_tensor * node, int n_tasks); // bytes
void ggml_compute_forward_tree_op(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
