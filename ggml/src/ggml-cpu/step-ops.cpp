// Attention masks and the likeliest tokens of ggml-tree.h on the CPU.
//
// Owns: the order of the computation and how threads share it. Masks are shared out by rows. Rows of logits are cut into
// blocks of a fixed size, each worked off by one thread, and what the blocks found is put together in their order:
// results are the same bits for any number of threads. Refuses nothing: the builders have checked the operands.
#include "step-ops.h"

#include "ggml-tree.h"
#include "tree-work.h"
#include "vec.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

namespace {

constexpr ggml_fp16_t kOpen = 0;        // 0.0
constexpr ggml_fp16_t kClosed = 0xfc00; // -infinity

ggml_fp16_t * mask_row(const ggml_tensor * mask, int64_t i) {
    return (ggml_fp16_t *) ((char *) mask->data + i * mask->nb[1]);
}

int64_t read_count(const ggml_tensor * t) {
    return std::max(*(const int32_t *) t->data, 0);
}

} // namespace

void ggml_compute_forward_tree_mask(const ggml_compute_params * params, ggml_tensor * dst) {
    const int32_t * parent = (const int32_t *) dst->src[0]->data;
    const int64_t n_kv = dst->ne[0];
    const int64_t n = std::min(read_count(dst->src[1]), n_kv);

    const Range share = thread_share(params, dst->ne[1]);
    for (int64_t i = share.begin; i < share.end; ++i) {
        ggml_fp16_t * row = mask_row(dst, i);
        std::fill(row, row + n, kOpen);
        std::fill(row + n, row + n_kv, kClosed);
        for (int64_t j = i; j >= 0; j = parent[j] < j ? parent[j] : -1) {
            if (n + j < n_kv) {
                row[n + j] = kOpen;
            }
        }
    }
}

void ggml_compute_forward_block_mask(const ggml_compute_params * params, ggml_tensor * dst) {
    const int64_t n_kv = dst->ne[0], block = dst->ne[1];
    const int64_t n = read_count(dst->src[0]);
    const int64_t n_ring = dst->op_params[0];
    const int64_t window = dst->op_params[1] > 0 ? dst->op_params[1] : INT64_MAX;
    const bool causal = dst->op_params[2] != 0;
    const int64_t n_held = std::min({n_ring, n_kv - block, n});
    const int64_t newest = (n - 1) % n_ring, turn = n - 1 - newest; // slots up to the newest hold this turn's positions

    const Range share = thread_share(params, block);
    for (int64_t s = share.begin; s < share.end; ++s) {
        ggml_fp16_t * row = mask_row(dst, s);
        std::fill(row, row + n_kv, kClosed);
        for (int64_t c = 0; c < block; ++c) {
            const int64_t behind = s - c;
            row[c] = behind < window && (causal ? behind >= 0 : -behind < window) ? kOpen : kClosed;
        }
        for (int64_t r = 0; r < n_held; ++r) {
            const int64_t position = r + (r <= newest ? turn : turn - n_ring);
            row[block + r] = n + s - position < window ? kOpen : kClosed;
        }
    }
}

// ------------------------------------------------------------------------------------------------- ggml_top_k_logp

namespace {

constexpr int64_t kBlock = 16384; // logits that one thread works off at a time
constexpr int64_t kGlance = 256;  // logits that are looked at one by one only when their largest is large enough
constexpr int32_t kInfinity = 0x7f800000;
constexpr int32_t kMinusInfinity = -kInfinity - 1; // as sortable() has it

// Integers that sort as the floats do, with 0 and -0 the same; NaNs lie above infinity or below -infinity. Compilers turn
// the largest of integers into vector code, the largest of floats not.
int32_t sortable(float x) {
    x += 0.0f;
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits ^ (int32_t) ((uint32_t) (bits >> 31) >> 1);
}

// One number per (logit, id) that sorts as the pair does: a larger logit first, at equal logits the lower id.
uint64_t rank_key(float logit, int64_t id) {
    return (uint64_t) ((uint32_t) sortable(logit) ^ 0x80000000u) << 32 | (uint32_t) ~id;
}

int32_t rank_id(uint64_t key) {
    return (int32_t) ~(uint32_t) key;
}

// What a block of a row holds.
struct Found {
    int32_t max; // sortable()
    bool usable; // neither NaN nor +inf
    double sum;  // of exp(x - max)
};

struct TopKWork {
    int64_t n_blocks; // of a row
    Found * found;    // [n_rows, n_blocks]
    uint64_t * keys;  // [n_rows, n_blocks, k], the k best of each block, unsorted; fewer in a block that is smaller

    TopKWork(Scratch & s, const ggml_tensor * op) {
        n_blocks = (op->src[0]->ne[0] + kBlock - 1) / kBlock;
        found = s.take<Found>(op->ne[1] * n_blocks);
        keys = s.take<uint64_t>(op->ne[1] * n_blocks * op->ne[0] / 2);
    }
};

int32_t largest(const float * x, int64_t n) {
    int32_t max = INT32_MIN;
    for (int64_t i = 0; i < n; ++i) {
        max = std::max(max, sortable(x[i]));
    }
    return max;
}

float from_sortable(int32_t key) {
    const int32_t bits = key ^ (int32_t) ((uint32_t) (key >> 31) >> 1);
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// The k largest keys of x [n], whose ids begin at first_id: a heap with the worst of them on top.
void best_of(const float * x, int64_t n, int64_t first_id, int64_t k, uint64_t * keys) {
    k = std::min(k, n);
    for (int64_t i = 0; i < k; ++i) {
        keys[i] = rank_key(x[i], first_id + i);
    }
    std::make_heap(keys, keys + k, std::greater<>());
    for (int64_t start = k; start < n; start += kGlance) {
        const int64_t end = std::min(start + kGlance, n);
        if (largest(x + start, end - start) <= (int32_t) ((uint32_t) (keys[0] >> 32) ^ 0x80000000u)) {
            continue; // ids rise: at equal logits the later one loses
        }
        for (int64_t i = start; i < end; ++i) {
            const uint64_t key = rank_key(x[i], first_id + i);
            if (key > keys[0]) {
                std::pop_heap(keys, keys + k, std::greater<>());
                keys[k - 1] = key;
                std::push_heap(keys, keys + k, std::greater<>());
            }
        }
    }
}

Found look_at(const float * x, int64_t n, int64_t first_id, int64_t k, uint64_t * keys) {
    int32_t max = INT32_MIN, min = INT32_MAX;
    for (int64_t i = 0; i < n; ++i) {
        const int32_t key = sortable(x[i]);
        max = std::max(max, key);
        min = std::min(min, key);
    }
    Found found = {max, max < kInfinity && min >= kMinusInfinity, 0};
    if (!found.usable) {
        return found;
    }
    if (max > kMinusInfinity) {
        float weight[kGlance];
        for (int64_t i = 0; i < n; i += kGlance) {
            found.sum += ggml_vec_soft_max_f32((int) std::min(kGlance, n - i), weight, x + i, from_sortable(max));
        }
    }
    best_of(x, n, first_id, k, keys);
    return found;
}

// Puts together what the blocks of one row hold. Moves the row's keys.
void finish_row(const float * x, int64_t n_vocab, const Found * found, int64_t n_blocks, uint64_t * keys, int64_t k,
                int32_t * ids, float * logp) {
    bool usable = true;
    int32_t max_key = kMinusInfinity;
    for (int64_t b = 0; b < n_blocks; ++b) {
        usable &= found[b].usable;
        max_key = std::max(max_key, found[b].max);
    }
    if (!usable || max_key == kMinusInfinity) {
        std::fill(ids, ids + k, -1);
        std::fill(logp, logp + k, -std::numeric_limits<float>::infinity());
        return;
    }
    const double max = from_sortable(max_key);
    double sum = 0;
    int64_t n_keys = 0;
    for (int64_t b = 0; b < n_blocks; ++b) {
        if (found[b].sum > 0) {
            sum += found[b].sum * std::exp(from_sortable(found[b].max) - max);
        }
        const int64_t n_here = std::min(k, n_vocab - b * kBlock);
        memmove(keys + n_keys, keys + b * k, n_here * sizeof *keys);
        n_keys += n_here;
    }
    std::partial_sort(keys, keys + k, keys + n_keys, std::greater<>());
    const double log_sum = std::log(sum);
    for (int64_t i = 0; i < k; ++i) {
        ids[i] = rank_id(keys[i]);
        const float logit = x[ids[i]];
        // The difference of two finite floats may not fit in one.
        logp[i] = logit == -std::numeric_limits<float>::infinity()
                      ? logit
                      : (float) std::max((logit - max) - log_sum, -(double) FLT_MAX);
    }
}

} // namespace

size_t ggml_top_k_logp_work_size(const ggml_tensor * dst) {
    Scratch count{nullptr};
    TopKWork(count, dst);
    return count.used;
}

void ggml_compute_forward_top_k_logp(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * logits = dst->src[0];
    const int64_t n_vocab = logits->ne[0], n_rows = logits->ne[1], k = dst->ne[0] / 2;

    Scratch scratch = shared_scratch(params, ggml_top_k_logp_work_size(dst));
    const TopKWork work(scratch, dst);

    const Range blocks = thread_share(params, n_rows * work.n_blocks);
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
        const int64_t first = b % work.n_blocks * kBlock;
        work.found[b] = look_at(row_of(logits, b / work.n_blocks) + first, std::min(kBlock, n_vocab - first), first, k,
                                work.keys + b * k);
    }
    ggml_barrier(params->threadpool);

    const Range rows = thread_share(params, n_rows);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
        int32_t * ids = (int32_t *) ((char *) dst->data + i * dst->nb[1]);
        float logp[GGML_TOP_K_MAX];
        finish_row(row_of(logits, i), n_vocab, work.found + i * work.n_blocks, work.n_blocks,
                   work.keys + i * work.n_blocks * k, k, ids, logp);
        memcpy(ids + k, logp, k * sizeof(float));
    }
}
