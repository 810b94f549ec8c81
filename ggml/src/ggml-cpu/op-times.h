// Where a graph's time goes, by op: for scripts/profile_step.py. Nothing is timed until somebody gives a table.
//
// Owns: one table for the process, filled by the first thread of whatever graph runs, so one graph at a time may run. A
// node's time reaches from the barrier before it to the barrier behind it: the op, and waiting for the slowest thread.
#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_op_time {
    int32_t op;      // GGML_OP_NONE: a free entry
    int32_t type;    // of the first operand
    int64_t k, m, n; // the first operand's ne[0], the result's ne[0] and ne[1]
    int64_t count, ns;
};

// `table` has n zeroed entries; null stops. What does not fit is left out.
GGML_API void ggml_op_times_into(struct ggml_op_time * table, int n);

#ifdef __cplusplus
}
#endif

extern struct ggml_op_time * ggml_op_times;

void ggml_op_times_begin(void);
void ggml_op_times_add(const struct ggml_tensor * node); // the time since the last call
