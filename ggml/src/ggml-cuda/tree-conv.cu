// ggml_ssm_conv_tree, the depthwise causal convolution along the tree, and ggml_ssm_conv_tree_persist, which keeps the last
// columns of the accepted path (contracts in ggml-tree.h).
//
// Of the convolution, one thread owns one channel and keeps its taps in registers; a block covers 128 channels of up to
// 8 nodes. Which column each tap of a node meets is the same for all channels: the block's first threads walk the parents
// once and leave it in shared memory. Any number of nodes, 2 to 16 taps, any row strides of state and x.
//
// Bytes: x and the result once, state and kernel once per 8 nodes (from L2 after the first). For the 27B, 48 layers of
// 10240 channels, 4 taps, 23 nodes: 104 MB, 0.11 ms at 936 GB/s. Keeping the columns: 12 MB.
#include "ggml-tree.h"
#include "tree-ops.cuh"

namespace {

constexpr int n_threads = 128;
constexpr int block_nodes = 8;

struct conv_args {
    const float * state;    // [taps - 1, channels]
    const float * x;        // [n, channels]
    const float * kernel;   // [channels, taps]
    const int32_t * parent; // [n]
    float * dst;            // [n, channels]
    int64_t state_row;      // strides in floats
    int64_t x_row;
    int64_t channels;
    int64_t n;
    int n_taps;
};

// exact_taps: their number where it is known at compile time, else 0
template <int exact_taps>
__global__ void __launch_bounds__(n_threads) conv_tree(const conv_args a) {
    constexpr int max_taps = exact_taps ? exact_taps : GGML_TREE_MAX_TAPS;
    const int n_taps = exact_taps ? exact_taps : a.n_taps;

    // the row of x that a tap meets, or -1 - the row of the state
    __shared__ int64_t source[block_nodes][max_taps];

    ggml_cuda_pdl_sync();

    const int64_t first = (int64_t) blockIdx.y * block_nodes;
    const int count = (int) min((int64_t) block_nodes, a.n - first);
    if (threadIdx.x < count) {
        int64_t node = first + threadIdx.x;
        int committed = n_taps - 2; // newest row of the state
        for (int tap = n_taps - 1; tap >= 0; --tap) {
            if (node < 0) {
                source[threadIdx.x][tap] = -1 - committed--;
                continue;
            }
            source[threadIdx.x][tap] = node;
            const int32_t p = a.parent[node];
            node = p >= 0 && p < node ? p : -1;
        }
    }
    __syncthreads();

    const int64_t c = (int64_t) blockIdx.x * n_threads + threadIdx.x;
    if (c >= a.channels) {
        return;
    }
    float taps[max_taps];
#pragma unroll
    for (int tap = 0; tap < max_taps; ++tap) {
        taps[tap] = tap < n_taps ? a.kernel[c * n_taps + tap] : 0.0f;
    }
    for (int i = 0; i < count; ++i) {
        float sum = 0.0f;
#pragma unroll
        for (int tap = 0; tap < max_taps; ++tap) {
            if (tap < n_taps) {
                const int64_t row = source[i][tap];
                sum += taps[tap] * (row >= 0 ? a.x[row * a.x_row + c] : a.state[(-1 - row) * a.state_row + c]);
            }
        }
        a.dst[(first + i) * a.channels + c] = sum;
    }
}

struct conv_persist_args {
    float * state;        // [rows, channels]
    const float * x;      // [n, channels]
    const int32_t * path; // [n_path]
    int64_t state_row;    // strides in floats
    int64_t x_row;
    int64_t channels;
    int64_t n, n_path;
    int n_rows;
};

// A thread owns a channel, reads what its column becomes and then writes it. The path is walked from its end.
__global__ void __launch_bounds__(n_threads) conv_persist(const conv_persist_args a) {
    __shared__ int64_t last[GGML_TREE_MAX_TAPS]; // rows of x, backwards
    __shared__ int n_new;

    ggml_cuda_pdl_sync();

    if (threadIdx.x == 0) {
        int n = 0;
        for (int64_t i = a.n_path - 1; i >= 0 && n < a.n_rows; --i) {
            const int32_t node = a.path[i];
            if (node >= 0 && node < a.n) {
                last[n++] = node;
            }
        }
        n_new = n;
    }
    __syncthreads();

    const int64_t c = (int64_t) blockIdx.x * n_threads + threadIdx.x;
    if (c >= a.channels || n_new == 0) {
        return;
    }
    float column[GGML_TREE_MAX_TAPS];
#pragma unroll
    for (int row = 0; row < GGML_TREE_MAX_TAPS; ++row) {
        if (row < a.n_rows) {
            const int from = row + n_new;
            column[row] =
                from < a.n_rows ? a.state[from * a.state_row + c] : a.x[last[a.n_rows - 1 - row] * a.x_row + c];
        }
    }
#pragma unroll
    for (int row = 0; row < GGML_TREE_MAX_TAPS; ++row) {
        if (row < a.n_rows) {
            a.state[row * a.state_row + c] = column[row];
        }
    }
}

} // namespace

void ggml_cuda_op_ssm_conv_tree_persist(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * x = dst->src[1];
    const ggml_tensor * path = dst->src[2];

    conv_persist_args a = {};
    a.state = (float *) dst->data;
    a.x = (const float *) x->data;
    a.path = (const int32_t *) path->data;
    a.state_row = floats(dst->nb[1]);
    a.x_row = floats(x->nb[1]);
    a.channels = dst->ne[0];
    a.n = x->ne[1];
    a.n_path = path->ne[0];
    a.n_rows = (int) dst->ne[1];

    const dim3 grid((a.channels + n_threads - 1) / n_threads);
    const ggml_cuda_kernel_launch_params launch(grid, dim3(n_threads), (size_t) 0, ctx.stream());
    ggml_cuda_kernel_launch(conv_persist, launch, a);
}

void ggml_cuda_op_ssm_conv_tree(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * state = dst->src[0];
    const ggml_tensor * x = dst->src[1];
    const ggml_tensor * kernel = dst->src[2];

    conv_args a = {};
    a.state = (const float *) state->data;
    a.x = (const float *) x->data;
    a.kernel = (const float *) kernel->data;
    a.parent = (const int32_t *) dst->src[3]->data;
    a.dst = (float *) dst->data;
    a.state_row = floats(state->nb[1]);
    a.x_row = floats(x->nb[1]);
    a.channels = x->ne[0];
    a.n = x->ne[1];
    a.n_taps = (int) kernel->ne[0];

    const dim3 grid((a.channels + n_threads - 1) / n_threads, (a.n + block_nodes - 1) / block_nodes);
    const ggml_cuda_kernel_launch_params launch(grid, dim3(n_threads), (size_t) 0, ctx.stream());
    if (a.n_taps == 4) {
        ggml_cuda_kernel_launch(conv_tree<4>, launch, a);
    } else {
        ggml_cuda_kernel_launch(conv_tree<0>, launch, a);
    }
}
