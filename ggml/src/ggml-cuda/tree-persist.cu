// ggml_gated_delta_net_tree_persist: the state advanced along the accepted path (contract in ggml-tree.h).
//
// A block owns 32 value columns of one head, a thread up to 16 entries of the state; the path is walked from its end, so
// that the decay down to the last node is a running product and every thread keeps its own: no shared memory, no barrier.
// Each entry of the state is read once and written once, in f32. A path of any length; entries outside 0 .. N-1 are
// skipped, and a path without valid entries leaves the state's bits alone.
//
// Bytes for the 27B (48 layers, 48 heads of 128 x 128): state read and written 302 MB, k and delta of the path from L2:
// 0.32 ms at 936 GB/s. The next verify reads the state again (151 MB, 0.16 ms).
#include "tree-ops.cuh"

namespace {

constexpr int n_threads = 256;
constexpr int columns = 32; // value columns of a block

struct persist_args {
    float * state;        // [hv, dv, d]
    const float * k;      // [n, hk, d]
    const float * delta;  // [n, hv, dv]
    const float * g;      // [n, hv]
    const int32_t * path; // [n_path]

    int64_t k_head, k_node; // strides in floats
    int64_t delta_head, delta_node;
    int64_t g_node;

    int64_t n, n_path;
    int hk, dv;
};

template <int d>
__global__ void __launch_bounds__(n_threads) delta_net_persist(const persist_args a) {
    constexpr int across = d < WARP_SIZE ? d : WARP_SIZE; // threads along a row of the state
    constexpr int down = n_threads / across;
    constexpr int own_columns = columns / down;
    constexpr int own_keys = d / across;

    const int head = blockIdx.y;
    const int key = threadIdx.x % across;
    const int c0 = blockIdx.x * columns + threadIdx.x / across;
    const float * k = a.k + head % a.hk * a.k_head + key;
    const float * delta = a.delta + head * a.delta_head;
    float * state = a.state + (int64_t) head * a.dv * d + key;

    ggml_cuda_pdl_sync();

    float given[own_columns][own_keys];
    float sum[own_columns][own_keys] = {};
#pragma unroll
    for (int m = 0; m < own_columns; ++m) {
        const int c = c0 + m * down;
#pragma unroll
        for (int s = 0; s < own_keys; ++s) {
            given[m][s] = c < a.dv ? state[(int64_t) c * d + s * across] : 0.0f;
        }
    }
    float weight = 1.0f; // decay from the node at hand down to the last
    bool advanced = false;
    for (int64_t i = a.n_path - 1; i >= 0 && weight > 0.0f; --i) {
        const int64_t node = a.path[i];
        if (node < 0 || node >= a.n) {
            continue;
        }
        advanced = true;
        float k_i[own_keys];
#pragma unroll
        for (int s = 0; s < own_keys; ++s) {
            k_i[s] = k[node * a.k_node + s * across];
        }
#pragma unroll
        for (int m = 0; m < own_columns; ++m) {
            const int c = c0 + m * down;
            const float x = c < a.dv ? weight * delta[node * a.delta_node + c] : 0.0f;
#pragma unroll
            for (int s = 0; s < own_keys; ++s) {
                sum[m][s] += x * k_i[s];
            }
        }
        weight *= expf(a.g[node * a.g_node + head]);
    }
    if (!advanced) {
        return;
    }
#pragma unroll
    for (int m = 0; m < own_columns; ++m) {
        const int c = c0 + m * down;
#pragma unroll
        for (int s = 0; s < own_keys; ++s) {
            if (c < a.dv) {
                state[(int64_t) c * d + s * across] = weight * given[m][s] + sum[m][s];
            }
        }
    }
}

} // namespace

void ggml_cuda_op_gated_delta_net_tree_persist(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * delta = dst->src[2];
    const ggml_tensor * g = dst->src[3];
    const ggml_tensor * path = dst->src[4];

    persist_args a = {};
    a.state = (float *) dst->data;
    a.k = (const float *) k->data;
    a.delta = (const float *) delta->data;
    a.g = (const float *) g->data;
    a.path = (const int32_t *) path->data;
    a.k_head = floats(k->nb[1]);
    a.k_node = floats(k->nb[2]);
    a.delta_head = floats(delta->nb[1]);
    a.delta_node = floats(delta->nb[2]);
    a.g_node = floats(g->nb[1]);
    a.n = delta->ne[2];
    a.n_path = path->ne[0];
    a.hk = (int) k->ne[1];
    a.dv = (int) delta->ne[0];

    const dim3 grid((a.dv + columns - 1) / columns, delta->ne[1]);
    const ggml_cuda_kernel_launch_params launch(grid, dim3(n_threads), (size_t) 0, ctx.stream());
    switch (k->ne[0]) {
    case 16:
        ggml_cuda_kernel_launch(delta_net_persist<16>, launch, a);
        break;
    case 32:
        ggml_cuda_kernel_launch(delta_net_persist<32>, launch, a);
        break;
    case 64:
        ggml_cuda_kernel_launch(delta_net_persist<64>, launch, a);
        break;
    case 128:
        ggml_cuda_kernel_launch(delta_net_persist<128>, launch, a);
        break;
    default:
        GGML_ABORT("head size %d", (int) k->ne[0]);
    }
}
