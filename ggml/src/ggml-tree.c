// Builders of the tree ops (ggml-tree.h). Owns: their checks and the packing of their results and parameters; computes
// nothing.
#include "ggml-tree.h"

#include "ggml-impl.h"

// f32, elements of a row contiguous, at most n_dims dimensions
static void check_rows(const struct ggml_tensor * t, int n_dims) {
    GGML_ASSERT(t->type == GGML_TYPE_F32);
    GGML_ASSERT(t->nb[0] == sizeof(float));
    GGML_ASSERT(ggml_n_dims(t) <= n_dims);
    for (int i = 1; i < n_dims; ++i) {
        GGML_ASSERT(t->nb[i] % sizeof(float) == 0);
    }
}

static void check_indices(const struct ggml_tensor * t) {
    GGML_ASSERT(t->type == GGML_TYPE_I32);
    GGML_ASSERT(ggml_is_vector(t) && ggml_is_contiguous(t));
}

struct ggml_tensor * ggml_ssm_conv_tree(struct ggml_context * ctx, struct ggml_tensor * state, struct ggml_tensor * x,
                                        struct ggml_tensor * kernel, struct ggml_tensor * parent) {
    const int64_t channels = x->ne[0];
    const int64_t n = x->ne[1];

    check_rows(x, 2);
    check_rows(state, 2);
    check_rows(kernel, 2);
    check_indices(parent);
    GGML_ASSERT(ggml_is_contiguous(kernel));
    GGML_ASSERT(kernel->ne[0] >= 2 && kernel->ne[0] <= GGML_TREE_MAX_TAPS && kernel->ne[1] == channels);
    GGML_ASSERT(state->ne[0] == channels && state->ne[1] == kernel->ne[0] - 1);
    GGML_ASSERT(parent->ne[0] == n);

    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, channels, n);

    result->op = GGML_OP_SSM_CONV_TREE;
    result->src[0] = state;
    result->src[1] = x;
    result->src[2] = kernel;
    result->src[3] = parent;
    return result;
}

struct ggml_tensor * ggml_ssm_conv_tree_persist(struct ggml_context * ctx, struct ggml_tensor * state,
                                                struct ggml_tensor * x, struct ggml_tensor * path) {
    check_rows(state, 2);
    check_rows(x, 2);
    check_indices(path);
    GGML_ASSERT(state->ne[0] == x->ne[0] && state->ne[1] < GGML_TREE_MAX_TAPS);

    struct ggml_tensor * result = ggml_view_tensor(ctx, state);

    result->op = GGML_OP_SSM_CONV_TREE_PERSIST;
    result->src[0] = state;
    result->src[1] = x;
    result->src[2] = path;
    return result;
}

struct ggml_tensor * ggml_gated_delta_net_tree(struct ggml_context * ctx, struct ggml_tensor * q,
                                               struct ggml_tensor * k, struct ggml_tensor * v, struct ggml_tensor * g,
                                               struct ggml_tensor * beta, struct ggml_tensor * state,
                                               struct ggml_tensor * parent) {
    const int64_t d = k->ne[0];
    const int64_t dv = v->ne[0];
    const int64_t hv = v->ne[1];
    const int64_t n = v->ne[2];

    check_rows(q, 3);
    check_rows(k, 3);
    check_rows(v, 3);
    check_rows(g, 2);
    check_rows(beta, 2);
    check_rows(state, 3);
    check_indices(parent);
    GGML_ASSERT(d % 16 == 0 && dv % 16 == 0);
    GGML_ASSERT(ggml_are_same_shape(q, k) && k->ne[2] == n);
    GGML_ASSERT(g->ne[0] == hv && g->ne[1] == n);
    GGML_ASSERT(ggml_are_same_shape(g, beta));
    GGML_ASSERT(ggml_is_contiguous(state));
    GGML_ASSERT(state->ne[0] == d && state->ne[1] == dv && state->ne[2] == hv);
    GGML_ASSERT(parent->ne[0] == n);

    struct ggml_tensor * result = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 2 * dv * hv * n); // out, then delta

    result->op = GGML_OP_GATED_DELTA_NET_TREE;
    result->src[0] = q;
    result->src[1] = k;
    result->src[2] = v;
    result->src[3] = g;
    result->src[4] = beta;
    result->src[5] = state;
    result->src[6] = parent;
    return result;
}

static struct ggml_tensor * part_of_result(struct ggml_context * ctx, struct ggml_tensor * r, int64_t part) {
    GGML_ASSERT(r->op == GGML_OP_GATED_DELTA_NET_TREE);
    const struct ggml_tensor * v = r->src[2];

    const size_t row = v->ne[0] * sizeof(float);
    return ggml_view_3d(ctx, r, v->ne[0], v->ne[1], v->ne[2], row, row * v->ne[1], part * row * v->ne[1] * v->ne[2]);
}

struct ggml_tensor * ggml_gated_delta_net_tree_out(struct ggml_context * ctx, struct ggml_tensor * r) {
    return part_of_result(ctx, r, 0);
}

struct ggml_tensor * ggml_gated_delta_net_tree_delta(struct ggml_context * ctx, struct ggml_tensor * r) {
    return part_of_result(ctx, r, 1);
}

struct ggml_tensor * ggml_gated_delta_net_tree_persist(struct ggml_context * ctx, struct ggml_tensor * state,
                                                       struct ggml_tensor * k, struct ggml_tensor * delta,
                                                       struct ggml_tensor * g, struct ggml_tensor * path) {
    const int64_t d = k->ne[0];
    const int64_t dv = delta->ne[0];
    const int64_t hv = delta->ne[1];
    const int64_t n = delta->ne[2];

    check_rows(state, 3);
    check_rows(k, 3);
    check_rows(delta, 3);
    check_rows(g, 2);
    check_indices(path);
    GGML_ASSERT(d % 16 == 0 && dv % 16 == 0);
    GGML_ASSERT(k->ne[2] == n);
    GGML_ASSERT(g->ne[0] == hv && g->ne[1] == n);
    GGML_ASSERT(ggml_is_contiguous(state));
    GGML_ASSERT(state->ne[0] == d && state->ne[1] == dv && state->ne[2] == hv);

    struct ggml_tensor * result = ggml_view_tensor(ctx, state);

    result->op = GGML_OP_GATED_DELTA_NET_TREE_PERSIST;
    result->src[0] = state;
    result->src[1] = k;
    result->src[2] = delta;
    result->src[3] = g;
    result->src[4] = path;
    return result;
}

struct ggml_tensor * ggml_tree_mask(struct ggml_context * ctx, struct ggml_tensor * parent,
                                    struct ggml_tensor * n_committed, int64_t n_kv) {
    check_indices(parent);
    check_indices(n_committed);
    GGML_ASSERT(n_committed->ne[0] == 1);
    GGML_ASSERT(n_kv >= 1);

    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, parent->ne[0]);

    result->op = GGML_OP_TREE_MASK;
    result->src[0] = parent;
    result->src[1] = n_committed;
    return result;
}

struct ggml_tensor * ggml_block_mask(struct ggml_context * ctx, struct ggml_tensor * n_committed, int64_t n_kv,
                                     int64_t block, int64_t n_ring, int64_t window, bool causal) {
    check_indices(n_committed);
    GGML_ASSERT(n_committed->ne[0] == 1);
    GGML_ASSERT(block >= 1 && block <= n_kv && block <= INT32_MAX);
    GGML_ASSERT(n_ring >= 1 && n_ring <= INT32_MAX);
    GGML_ASSERT(window >= 0 && window <= INT32_MAX);

    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, block);

    result->op = GGML_OP_BLOCK_MASK;
    result->op_params[0] = (int32_t) n_ring;
    result->op_params[1] = (int32_t) window;
    result->op_params[2] = causal;
    result->src[0] = n_committed;
    return result;
}

struct ggml_tensor * ggml_top_k_logp(struct ggml_context * ctx, struct ggml_tensor * logits, int k) {
    check_rows(logits, 2);
    GGML_ASSERT(ggml_is_contiguous(logits));
    GGML_ASSERT(logits->ne[0] <= INT32_MAX);
    GGML_ASSERT(k >= 1 && k <= GGML_TOP_K_MAX && k <= logits->ne[0]);

    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2 * (int64_t) k, logits->ne[1]);

    result->op = GGML_OP_TOP_K_LOGP;
    result->src[0] = logits;
    return result;
}

void ggml_graph_seal(struct ggml_cgraph * graph) {
    graph->uid = ggml_graph_next_uid(); // by which a backend knows it again
}
