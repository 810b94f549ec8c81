#include "op-times.h"

#include <time.h>

struct ggml_op_time * ggml_op_times = NULL;

static int n_entries;
static int64_t last_ns;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t) t.tv_sec * 1000000000 + t.tv_nsec;
}

void ggml_op_times_into(struct ggml_op_time * table, int n) {
    ggml_op_times = table;
    n_entries = n;
}

void ggml_op_times_begin(void) {
    last_ns = now_ns();
}

void ggml_op_times_add(const struct ggml_tensor * node) {
    const struct ggml_tensor * first = node->src[0] ? node->src[0] : node;
    const int64_t ns = now_ns();
    for (int i = 0; i < n_entries; ++i) {
        struct ggml_op_time * e = &ggml_op_times[i];
        if (e->op == GGML_OP_NONE) {
            *e = (struct ggml_op_time){node->op, first->type, first->ne[0], node->ne[0], node->ne[1], 0, 0};
        }
        if (e->op == (int32_t) node->op && e->type == (int32_t) first->type && e->k == first->ne[0] &&
            e->m == node->ne[0] && e->n == node->ne[1]) {
            e->count++;
            e->ns += ns - last_ns;
            break;
        }
    }
    last_ns = now_ns();
}
