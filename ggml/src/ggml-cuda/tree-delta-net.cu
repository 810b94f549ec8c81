// ggml_gated_delta_net_tree: the gated delta rule along the tree, in WY form (contract in ggml-tree.h).
//
// A block owns 32 value columns of one head: 192 blocks for the 27B's 48 heads, where the heads alone would leave 34 of
// 82 multiprocessors idle. With D_ij the decay multiplied along the path from node j down to node i (0 where j is not on
// it) the block computes, all on chip:
//
//   R = [K; Q] [S | K]^T              one product, K and Q tiled through shared memory 16 keys at a time
//   A_ij = beta_i D_ij (k_j.k_i)      strictly lower; B_ij = D_ij (k_j.q_i) / sqrt(d), lower: both in one square
//   delta_i = beta_i (v_i - D_i S^T k_i) - sum_j A_ij delta_j      forward substitution, columns apart
//   out_i   = D_i S^T q_i / sqrt(d) + sum_j B_ij delta_j
//
// A thread owns one node (two of 64) and a few columns, so the substitution needs no barrier: delta_j goes to the other
// nodes of its column by a shuffle. D is a product along the path and never e^{G_i - G_j}: no digits cancel, and g = -inf
// is a plain zero. No state but S is formed; S is read from device memory once. A chain longer than 64 is worked off in
// runs of 64 and S is advanced between them where it lies, in shared memory, by the deltas weighted with their decay down
// to the run's last node.
//
// d is 16, 32, 64 or 128; dv any multiple of 16; value head h reads key head h % Hk; any strides of heads and nodes.
// Shared memory at 64 nodes, d = 128: 44 KiB, so that two blocks share a multiprocessor of sm_86 and none asks for the
// opt-in above 48 KiB.
//
// Bytes for the 27B (48 layers, 48 value and 16 key heads of 128, 23 nodes): state 151 MB, v, out and delta 81 MB, q and k
// 18 MB (again from L2 for the 12 blocks that share a key head), 250 MB in all: 0.27 ms at 936 GB/s.
#include "ggml-tree.h"
#include "tree-ops.cuh"

namespace {

constexpr int n_threads = 256;
constexpr int columns = 32;             // value columns of a block
constexpr int column_row = columns + 1; // floats between the rows of a [node][column] tile
constexpr int chunk = 16;               // keys of a tile of K and Q
constexpr int chunk_row = chunk + 4;    // rows 16-byte aligned, 8 of them on different banks

struct delta_net_args {
    const float * q;        // [n, hk, d]
    const float * k;        // [n, hk, d]
    const float * v;        // [n, hv, dv]
    const float * g;        // [n, hv]
    const float * beta;     // [n, hv]
    const float * state;    // [hv, dv, d]
    const int32_t * parent; // [n]
    float * out;            // [n, hv, dv]
    float * delta;          // [n, hv, dv]

    int64_t q_head, q_node; // strides in floats
    int64_t k_head, k_node;
    int64_t v_head, v_node;
    int64_t g_node, beta_node;

    int64_t n;
    int hk, hv, dv;
    float scale;  // 1 / sqrt(d)
    bool aligned; // q, k, v and state can be read 16 bytes at a time
};

__device__ float4 load4(const float * p) {
    return *(const float4 *) p;
}

__device__ float4 load4(const float * p, bool aligned) {
    return aligned ? load4(p) : make_float4(p[0], p[1], p[2], p[3]);
}

__device__ void store4(float * p, const float4 x) {
    *(float4 *) p = x;
}

__device__ void add_dot(float & sum, const float4 a, const float4 b) {
    sum += a.x * b.x;
    sum += a.y * b.y;
    sum += a.z * b.z;
    sum += a.w * b.w;
}

// n_max: nodes of a run at most. Up to 32 a thread has one node, beyond two.
template <int d, int n_max>
__global__ void __launch_bounds__(n_threads, n_max > WARP_SIZE ? 2 : 3) delta_net_tree(const delta_net_args a) {
    constexpr int lanes = n_max < WARP_SIZE ? n_max : WARP_SIZE; // neighbouring threads that share their columns
    constexpr int rows = n_max / lanes;                          // nodes of a thread: lane, lane + 32
    constexpr int groups = n_threads / lanes;
    constexpr int own = columns / groups;                        // columns of a thread
    constexpr int own_keys = (n_max + groups - 1) / groups;      // nodes j whose k_j.k_i and k_j.q_i it computes
    constexpr int quads = 2 * n_max * chunk / 4;                 // of keys in a tile of K and Q
    constexpr int fetches = (quads + n_threads - 1) / n_threads; // of those a thread loads
    constexpr int state_row = d + 4;
    constexpr int square_row = n_max + 1;
    constexpr int square_size = n_max * square_row;
    constexpr int tiles_size = 2 * n_max * column_row;

    __shared__ __align__(16) float state[columns * state_row];  // [column][key]
    __shared__ __align__(16) float tile[2 * n_max * chunk_row]; // k, then q [node][key]; then v [node][column]
    // [j][i], j <= i, the decays D_ij; then A_ij at [j][i] and B_ij at [i][j]; then delta and out [node][column]
    __shared__ float square[square_size > tiles_size ? square_size : tiles_size];
    __shared__ float step[n_max];   // e^{g_i}
    __shared__ float decay[n_max];  // from the committed state down to i
    __shared__ float weight[n_max]; // from i down to the last node of the run
    __shared__ float beta[n_max];
    __shared__ int parent[n_max]; // within the run

    const int tid = threadIdx.x;
    const int lane = tid % lanes;
    const int group = tid / lanes;
    const int head = blockIdx.y;
    const int c0 = blockIdx.x * columns;
    const int n_columns = min(columns, a.dv - c0);

    const float * q = a.q + head % a.hk * a.q_head;
    const float * k = a.k + head % a.hk * a.k_head;
    const float * v = a.v + head * a.v_head + c0;

    ggml_cuda_pdl_sync();

    const float * given = a.state + ((int64_t) head * a.dv + c0) * d;
#pragma unroll
    for (int at = 4 * tid; at < columns * d; at += 4 * n_threads) {
        const bool inside = at / d < n_columns;
        store4(state + at / d * state_row + at % d,
               inside ? load4(given + at, a.aligned) : make_float4(0.0f, 0.0f, 0.0f, 0.0f));
    }

    for (int64_t first = 0; first < a.n; first += n_max) {
        const int n = (int) min((int64_t) n_max, a.n - first);

        if (tid < n_max) {
            const int64_t node = first + tid;
            const int64_t p = tid < n ? a.parent[node] - first : -1;
            parent[tid] = p >= 0 && p < tid ? (int) p : -1;
            step[tid] = tid < n ? expf(a.g[node * a.g_node + head]) : 0.0f;
            beta[tid] = tid < n ? a.beta[node * a.beta_node + head] : 0.0f;
        }
        __syncthreads();

        // Thread j < n multiplies the decays from node j down, thread n those from the committed state.
        if (tid <= n) {
            const int j = tid < n ? tid : -1;
            float * path = j < 0 ? decay : square + j * square_row;
            float last = 1.0f; // at node i - 1
            if (j >= 0) {
                path[j] = 1.0f;
            }
            for (int i = j + 1; i < n; ++i) {
                const int p = parent[i];
                const float above = p == i - 1 ? last : p > j ? path[p] : p == j ? 1.0f : 0.0f;
                last = step[i] * above;
                path[i] = last;
            }
            if (j >= 0) {
                weight[j] = last;
            }
        }

        float k_state[rows][own] = {}; // S^T k_i
        float q_state[rows][own] = {};
        float k_key[rows][own_keys] = {}; // k_j.k_i
        float q_key[rows][own_keys] = {};

        float4 fetched[fetches];
        const auto fetch = [&](int t0) {
#pragma unroll
            for (int f = 0; f < fetches; ++f) {
                const int at = tid + f * n_threads;
                const int row = at / (chunk / 4);
                const int t = t0 + at % (chunk / 4) * 4;
                const int i = row % n_max;
                const float * from = row < n_max ? k + (first + i) * a.k_node : q + (first + i) * a.q_node;
                fetched[f] =
                    row < 2 * n_max && i < n ? load4(from + t, a.aligned) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            }
        };
        fetch(0);
        for (int t0 = 0; t0 < d; t0 += chunk) {
            __syncthreads();
#pragma unroll
            for (int f = 0; f < fetches; ++f) {
                const int at = tid + f * n_threads;
                if (at < quads) {
                    store4(tile + at / (chunk / 4) * chunk_row + at % (chunk / 4) * 4, fetched[f]);
                }
            }
            __syncthreads();
            if (t0 + chunk < d) {
                fetch(t0 + chunk); // arrives while this tile is worked on
            }
#pragma unroll 1 // unrolled it would hold more of the tile than there are registers
            for (int t = 0; t < chunk; t += 4) {
                float4 k_i[rows], q_i[rows];
#pragma unroll
                for (int r = 0; r < rows; ++r) {
                    k_i[r] = load4(tile + (r * lanes + lane) * chunk_row + t);
                    q_i[r] = load4(tile + (n_max + r * lanes + lane) * chunk_row + t);
                }
#pragma unroll
                for (int u = 0; u < own; ++u) {
                    const float4 s = load4(state + (group * own + u) * state_row + t0 + t);
#pragma unroll
                    for (int r = 0; r < rows; ++r) {
                        add_dot(k_state[r][u], k_i[r], s);
                        add_dot(q_state[r][u], q_i[r], s);
                    }
                }
#pragma unroll
                for (int u = 0; u < own_keys; ++u) {
                    const int j = u * groups + group;
                    if (j < n_max) {
                        const float4 k_j = load4(tile + j * chunk_row + t);
#pragma unroll
                        for (int r = 0; r < rows; ++r) {
                            if ((r + 1) * lanes > u * groups) { // else j > i for all its lanes
                                add_dot(k_key[r][u], k_i[r], k_j);
                                add_dot(q_key[r][u], q_i[r], k_j);
                            }
                        }
                    }
                }
            }
        }
        __syncthreads();

#pragma unroll
        for (int at = 4 * tid; at < n_max * columns; at += 4 * n_threads) {
            const int i = at / columns;
            const int c = at % columns;
            const bool inside = i < n && c < n_columns;
            const float4 x =
                inside ? load4(v + (first + i) * a.v_node + c, a.aligned) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            tile[i * column_row + c] = x.x;
            tile[i * column_row + c + 1] = x.y;
            tile[i * column_row + c + 2] = x.z;
            tile[i * column_row + c + 3] = x.w;
        }
#pragma unroll
        for (int u = 0; u < own_keys; ++u) {
#pragma unroll
            for (int r = 0; r < rows; ++r) {
                const int j = u * groups + group;
                const int i = r * lanes + lane;
                if (j < n_max && j <= i) {
                    const float path = i < n ? square[j * square_row + i] : 0.0f;
                    square[j * square_row + i] = beta[i] * path * k_key[r][u];
                    square[i * square_row + j] = a.scale * path * q_key[r][u]; // on the diagonal this is the one read
                }
            }
        }
        __syncthreads();

        float delta[rows][own];
        float out[rows][own];
#pragma unroll
        for (int r = 0; r < rows; ++r) {
            const int i = r * lanes + lane;
            const float from_state = i < n ? decay[i] : 0.0f;
#pragma unroll
            for (int u = 0; u < own; ++u) {
                const float v_i = tile[i * column_row + group * own + u];
                delta[r][u] = beta[i] * (v_i - from_state * k_state[r][u]);
                out[r][u] = a.scale * from_state * q_state[r][u];
            }
        }
#pragma unroll
        for (int above = 0; above < rows; ++above) {
            const int count = min(n - above * lanes, lanes);
            for (int from = 0; from < count; ++from) {
                const int j = above * lanes + from;
                float known[own];
#pragma unroll
                for (int u = 0; u < own; ++u) {
                    known[u] = __shfl_sync(0xffffffff, delta[above][u], from, lanes);
                }
#pragma unroll
                for (int r = above; r < rows; ++r) {
                    const int i = r * lanes + lane;
                    const float solve = i > j ? square[j * square_row + i] : 0.0f;
                    const float mix = i >= j ? square[i * square_row + j] : 0.0f;
#pragma unroll
                    for (int u = 0; u < own; ++u) {
                        delta[r][u] -= solve * known[u];
                        out[r][u] += mix * known[u];
                    }
                }
            }
        }
        __syncthreads();

        float * delta_tile = square;
        float * out_tile = square + n_max * column_row;
#pragma unroll
        for (int r = 0; r < rows; ++r) {
#pragma unroll
            for (int u = 0; u < own; ++u) {
                const int at = (r * lanes + lane) * column_row + group * own + u;
                delta_tile[at] = delta[r][u];
                out_tile[at] = out[r][u];
            }
        }
        __syncthreads();

        for (int at = tid; at < n * columns; at += n_threads) {
            const int i = at / columns;
            const int c = at % columns;
            if (c < n_columns) {
                const int64_t to = ((first + i) * a.hv + head) * a.dv + c0 + c;
                a.delta[to] = delta_tile[i * column_row + c];
                a.out[to] = out_tile[i * column_row + c];
            }
        }
        if (n_max < GGML_TREE_MAX_NODES || first + n == a.n) {
            return; // a run of less than the most nodes is never followed by another
        }

        // S[c] <- decay S[c] + sum_i weight_i delta_i[c] k_i
        constexpr int across = d < WARP_SIZE ? d : WARP_SIZE; // threads along a row of S
        constexpr int down = n_threads / across;
        float sum[columns / down][d / across] = {};
        for (int i = 0; i < n; ++i) {
            const float * k_i = k + (first + i) * a.k_node + tid % across;
#pragma unroll
            for (int m = 0; m < columns / down; ++m) {
                const float x = weight[i] * delta_tile[i * column_row + m * down + tid / across];
#pragma unroll
                for (int s = 0; s < d / across; ++s) {
                    sum[m][s] += x * k_i[s * across];
                }
            }
        }
#pragma unroll
        for (int m = 0; m < columns / down; ++m) {
#pragma unroll
            for (int s = 0; s < d / across; ++s) {
                float & entry = state[(m * down + tid / across) * state_row + s * across + tid % across];
                entry = decay[n - 1] * entry + sum[m][s];
            }
        } // the next run's first barrier comes before anything of this that a thread might still read
    }
}

template <int d>
void launch_delta_net_tree(const delta_net_args & a, cudaStream_t stream) {
    const dim3 grid((a.dv + columns - 1) / columns, a.hv);
    const ggml_cuda_kernel_launch_params launch(grid, dim3(n_threads), (size_t) 0, stream);
    if (a.n <= 8) {
        ggml_cuda_kernel_launch(delta_net_tree<d, 8>, launch, a);
    } else if (a.n <= 32) {
        ggml_cuda_kernel_launch(delta_net_tree<d, 32>, launch, a);
    } else {
        ggml_cuda_kernel_launch(delta_net_tree<d, GGML_TREE_MAX_NODES>, launch, a);
    }
}

} // namespace

void ggml_cuda_op_gated_delta_net_tree(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    const ggml_tensor * g = dst->src[3];
    const ggml_tensor * beta = dst->src[4];

    delta_net_args a = {};
    a.q = (const float *) q->data;
    a.k = (const float *) k->data;
    a.v = (const float *) v->data;
    a.g = (const float *) g->data;
    a.beta = (const float *) beta->data;
    a.state = (const float *) dst->src[5]->data;
    a.parent = (const int32_t *) dst->src[6]->data;
    a.out = (float *) dst->data;
    a.delta = a.out + ggml_nelements(v);
    a.q_head = floats(q->nb[1]);
    a.q_node = floats(q->nb[2]);
    a.k_head = floats(k->nb[1]);
    a.k_node = floats(k->nb[2]);
    a.v_head = floats(v->nb[1]);
    a.v_node = floats(v->nb[2]);
    a.g_node = floats(g->nb[1]);
    a.beta_node = floats(beta->nb[1]);
    a.n = v->ne[2];
    a.hk = (int) k->ne[1];
    a.hv = (int) v->ne[1];
    a.dv = (int) v->ne[0];
    a.scale = 1.0f / sqrtf((float) k->ne[0]);
    a.aligned = true;
    for (const ggml_tensor * t : {q, k, v, (const ggml_tensor *) dst->src[5]}) {
        a.aligned = a.aligned && ggml_cuda_is_aligned(t, 16);
    }

    switch (k->ne[0]) {
    case 16:
        launch_delta_net_tree<16>(a, ctx.stream());
        break;
    case 32:
        launch_delta_net_tree<32>(a, ctx.stream());
        break;
    case 64:
        launch_delta_net_tree<64>(a, ctx.stream());
        break;
    case 128:
        launch_delta_net_tree<128>(a, ctx.stream());
        break;
    default:
        GGML_ABORT("head size %d", (int) k->ne[0]);
    }
}
