// Dispatch of the tree ops, and what their kernels take of what the builders let through.
#include "tree-ops.cuh"

static bool is_head_size(int64_t d) {
    return d == 16 || d == 32 || d == 64 || d == 128;
}

bool ggml_cuda_tree_op_supported(const ggml_tensor * op) {
    constexpr int64_t max_grid_y = 65535;
    switch (op->op) {
    case GGML_OP_SSM_CONV_TREE:
    case GGML_OP_TREE_MASK:
    case GGML_OP_BLOCK_MASK:
    case GGML_OP_TOP_K_LOGP:
        return op->ne[1] <= max_grid_y;
    case GGML_OP_SSM_CONV_TREE_PERSIST:
        return true;
    case GGML_OP_GATED_DELTA_NET_TREE:
    case GGML_OP_GATED_DELTA_NET_TREE_PERSIST:
        return is_head_size(op->src[1]->ne[0]) && op->src[2]->ne[1] <= max_grid_y;
    default:
        return false;
    }
}

void ggml_cuda_tree_op(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    switch (dst->op) {
    case GGML_OP_SSM_CONV_TREE:
        ggml_cuda_op_ssm_conv_tree(ctx, dst);
        break;
    case GGML_OP_SSM_CONV_TREE_PERSIST:
        ggml_cuda_op_ssm_conv_tree_persist(ctx, dst);
        break;
    case GGML_OP_GATED_DELTA_NET_TREE:
        ggml_cuda_op_gated_delta_net_tree(ctx, dst);
        break;
    case GGML_OP_GATED_DELTA_NET_TREE_PERSIST:
        ggml_cuda_op_gated_delta_net_tree_persist(ctx, dst);
        break;
    case GGML_OP_TREE_MASK:
        ggml_cuda_op_tree_mask(ctx, dst);
        break;
    case GGML_OP_BLOCK_MASK:
        ggml_cuda_op_block_mask(ctx, dst);
        break;
    case GGML_OP_TOP_K_LOGP:
        ggml_cuda_op_top_k_logp(ctx, dst);
        break;
    default:
        GGML_ABORT("not a tree op: %s", ggml_op_name(dst->op));
    }
}
