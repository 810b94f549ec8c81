#pragma once

#include "ggml.h"

struct ggml_compute_params;

#ifdef __cplusplus
extern "C" {
#endif

// Attention of queries, or heads, that share keys under a mask: true if it was computed here, false where it is left to
// upstream (a lone row, no mask, a mask for every head, sinks, soft caps, position biases, odd widths).
bool ggml_compute_forward_gqa_attention(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// Work memory that it needs; 0 where it will not compute.
size_t ggml_gqa_attention_work_size(int n_tasks, const struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
