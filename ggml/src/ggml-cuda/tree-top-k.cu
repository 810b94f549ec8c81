// ggml_top_k_logp: the k likeliest tokens of each row with exact log-probabilities (contract in ggml-tree.h).
//
// First every block reads 4096 logits of a row into registers and leaves its k largest in scratch, with their maximum and
// the sum of exp(x - maximum). Then one block a row picks the k largest of those; where they are more than 4096 (k = 64 and
// a vocabulary beyond 262144), rounds of the same go before. A logit and its id are one 64-bit key that sorts as the pair
// does, ties by the lowest id, so no two keys are equal and no order of threads shows in the result.
//
// The k largest of 4096 without sorting: the k-th largest of 64 maxima, each over 4 threads, is a bound that k keys reach;
// few others do. Those are gathered, and each counts how many are larger: that is its place. (Keys chosen to defeat the
// bound cost time, not correctness: all 4096 may be gathered.)
//
// A NaN or an infinity makes the sum NaN, a row without a finite logit makes it 0: both fail `sum > 0`.
//
// Bytes: the logits once. 23 rows of 248320: 22.8 MB, 24.4 us at 936 GB/s; scratch at most 0.8 MB.
#include "ggml-tree.h"
#include "tree-ops.cuh"

#include <cfloat>

namespace {

constexpr int n_threads = 256;
constexpr int per_thread = 16;
constexpr int slice = n_threads * per_thread; // keys that a block picks from
constexpr int n_groups = 64;                  // of 4 threads, each with its maximum
constexpr uint64_t no_key = 0;                // below every key

static_assert(n_groups >= GGML_TOP_K_MAX, "the bound is the k-th of the groups' maxima");

// Unsigned numbers that sort as the floats do, 0 and -0 the same; NaNs lie above infinity or below -infinity.
__device__ uint32_t sortable(float x) {
    const uint32_t bits = __float_as_uint(x);
    return bits == 0x80000000 ? 0x80000000 : bits ^ (bits & 0x80000000 ? 0xffffffff : 0x80000000);
}

__device__ float from_sortable(uint32_t key) {
    return __uint_as_float(key ^ (key & 0x80000000 ? 0x80000000 : 0xffffffff));
}

__device__ uint64_t make_key(float logit, int64_t id) {
    return (uint64_t) sortable(logit) << 32 | (uint32_t) ~(uint32_t) id;
}

__device__ float logit_of(uint64_t key) {
    return from_sortable((uint32_t) (key >> 32));
}

__device__ int32_t id_of(uint64_t key) {
    return (int32_t) ~(uint32_t) key;
}

__device__ uint64_t larger(uint64_t a, uint64_t b) {
    return a > b ? a : b;
}

// The k largest of the block's keys to `best`, largest first, no_key where there are less; returns the largest.
__device__ uint64_t pick(const uint64_t (&keys)[per_thread], int k, uint64_t * best) {
    __shared__ uint64_t maxima[n_groups];
    __shared__ uint64_t bound;
    __shared__ uint64_t largest;
    __shared__ int count;
    __shared__ uint64_t candidates[slice];

    const int tid = threadIdx.x;
    uint64_t maximum = keys[0];
#pragma unroll
    for (int i = 1; i < per_thread; ++i) {
        maximum = larger(maximum, keys[i]);
    }
    constexpr int group_size = n_threads / n_groups;
#pragma unroll
    for (int offset = group_size / 2; offset > 0; offset >>= 1) {
        maximum = larger(maximum, __shfl_xor_sync(0xffffffff, maximum, offset));
    }
    if (tid % group_size == 0) {
        maxima[tid / group_size] = maximum;
    }
    if (tid == 0) {
        bound = no_key; // stays where fewer than k groups hold keys: then all keys are candidates
        largest = no_key;
        count = 0;
    }
    __syncthreads();

    if (tid < n_groups && maxima[tid] != no_key) {
        int place = 0;
        for (int i = 0; i < n_groups; ++i) {
            place += maxima[i] > maxima[tid];
        }
        if (place == k - 1) {
            bound = maxima[tid];
        }
        if (place == 0) {
            largest = maxima[tid];
        }
    }
    __syncthreads(); // for speed alone: without the bound all keys are gathered

#pragma unroll
    for (int i = 0; i < per_thread; ++i) {
        if (keys[i] != no_key && keys[i] >= bound) {
            candidates[atomicAdd(&count, 1)] = keys[i];
        }
    }
    __syncthreads();

    for (int c = tid; c < count; c += n_threads) {
        const uint64_t key = candidates[c];
        int place = 0;
        for (int i = 0; i < count; ++i) {
            place += candidates[i] > key;
        }
        if (place < k) {
            best[place] = key;
        }
    }
    for (int place = count + tid; place < k; place += n_threads) {
        best[place] = no_key;
    }
    return largest;
}

__device__ float sum_of_block(float x) {
    __shared__ float sums[n_threads / WARP_SIZE];
    return block_reduce<block_reduce_method::SUM, n_threads>(x, sums);
}

// best [rows, slices, k], sums [rows, slices]: (largest logit, sum of exp(x - largest)) of each slice
__global__ void __launch_bounds__(n_threads)
    top_k_of_slice(const float * logits, int64_t n_vocab, int k, uint64_t * best, float2 * sums) {
    ggml_cuda_pdl_sync();

    const int64_t row = blockIdx.y;
    const int64_t at = row * gridDim.x + blockIdx.x;
    const int64_t first = (int64_t) blockIdx.x * slice + threadIdx.x;

    uint64_t keys[per_thread];
#pragma unroll
    for (int i = 0; i < per_thread; ++i) {
        const int64_t id = first + i * n_threads;
        keys[i] = id < n_vocab ? make_key(logits[row * n_vocab + id], id) : no_key;
    }
    const float largest = logit_of(pick(keys, k, best + at * k));

    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < per_thread; ++i) {
        const float logit = logit_of(keys[i]);
        if (keys[i] != no_key && logit != -INFINITY) {
            sum += expf(logit - largest);
        }
    }
    sum = sum_of_block(sum);
    if (threadIdx.x == 0) {
        sums[at] = make_float2(largest, sum);
    }
}

// One more round: from keys [rows, n_keys] to best [rows, slices, k]. The last one, of one slice, also puts together the
// first round's sums [rows, n_sums] and writes dst [rows, 2 k].
template <bool last>
__global__ void __launch_bounds__(n_threads)
    top_k_of_keys(const uint64_t * keys_of_rows, int64_t n_keys, int k, uint64_t * best, const float2 * sums,
                  int64_t n_sums, int32_t * dst) {
    ggml_cuda_pdl_sync();

    const int64_t row = blockIdx.y;
    const int64_t first = (int64_t) blockIdx.x * slice + threadIdx.x;
    uint64_t keys[per_thread];
#pragma unroll
    for (int i = 0; i < per_thread; ++i) {
        const int64_t at = first + i * n_threads;
        keys[i] = at < n_keys ? keys_of_rows[row * n_keys + at] : no_key;
    }
    uint64_t * picked = best + (row * gridDim.x + blockIdx.x) * k;
    const float largest = logit_of(pick(keys, k, picked));
    if constexpr (last) {
        float sum = 0.0f;
        for (int64_t i = threadIdx.x; i < n_sums; i += n_threads) {
            const float2 part = sums[row * n_sums + i];
            if (!(part.y == 0.0f)) { // 0: nothing but masked tokens
                sum += part.y * expf(part.x - largest);
            }
        }
        sum = sum_of_block(sum); // and its barrier: what the block has picked is there

        if (threadIdx.x < k) {
            const bool usable = sum > 0.0f;
            const float logit = logit_of(picked[threadIdx.x]);
            float logp = -INFINITY;
            if (usable && logit != -INFINITY) {
                // the difference of two finite floats may not fit in one
                logp = (float) max((double) logit - largest - log((double) sum), -(double) FLT_MAX);
            }
            dst[row * 2 * k + threadIdx.x] = usable ? id_of(picked[threadIdx.x]) : -1;
            dst[row * 2 * k + k + threadIdx.x] = __float_as_int(logp);
        }
    }
}

int64_t slices_of(int64_t n) {
    return (n + slice - 1) / slice;
}

} // namespace

void ggml_cuda_op_top_k_logp(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const int64_t n_vocab = dst->src[0]->ne[0];
    const int64_t n_rows = dst->ne[1];
    const int k = (int) (dst->ne[0] / 2);

    const int64_t n_slices = slices_of(n_vocab);
    int64_t n_keys = n_slices * k;
    ggml_cuda_pool_alloc<float2> sums(ctx.pool(), n_rows * n_slices);
    ggml_cuda_pool_alloc<uint64_t> first(ctx.pool(), n_rows * n_keys);
    ggml_cuda_pool_alloc<uint64_t> second(ctx.pool(), n_rows * slices_of(n_keys) * k);
    uint64_t * from = first.get();
    uint64_t * to = second.get();

    const auto launch = [&](int64_t n) {
        return ggml_cuda_kernel_launch_params(dim3(n, n_rows), dim3(n_threads), (size_t) 0, ctx.stream());
    };
    ggml_cuda_kernel_launch(top_k_of_slice, launch(n_slices), (const float *) dst->src[0]->data, n_vocab, k, from,
                            sums.get());
    for (; n_keys > slice; n_keys = slices_of(n_keys) * k) {
        ggml_cuda_kernel_launch(top_k_of_keys<false>, launch(slices_of(n_keys)), from, n_keys, k, to, sums.get(),
                                n_slices, (int32_t *) nullptr);
        std::swap(from, to);
    }
    ggml_cuda_kernel_launch(top_k_of_keys<true>, launch(1), from, n_keys, k, to, sums.get(), n_slices,
                            (int32_t *) dst->data);
}
