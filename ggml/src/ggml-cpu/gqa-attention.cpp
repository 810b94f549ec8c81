// Softmax attention of a few queries or many, on the small products of tree-gemm.h.
//
// Upstream walks the keys once for every query and head below 64 queries, and above it for every head. Here the heads that
// share keys and a block of queries make the rows of one product, and lie across the lanes: scores are K Q' [keys][rows],
// and what is said is V' P [d][rows], both with the cache's own rows as the left factor, so keys and values are unpacked
// once, transposed never, and softmax runs down the columns. Fewer than sixteen rows (a query or two and the heads of a
// key) take dot products instead, with d across the lanes. Accumulators are f32 whatever the cache's type.
//
// Owns: the order of sums. Long caches are cut into slices that depend on the shapes alone, and put together in their
// order: results are the same bits for any number of threads. Refuses nothing: what it does not do it leaves to upstream.
#include "gqa-attention.h"

#include "cache-rows.h"
#include "float-lanes.h"
#include "tree-gemm.h"
#include "tree-work.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

namespace {

constexpr int64_t kMinRows = 16; // fewer leave too many lanes of a product empty
constexpr int64_t kMaxRows = 64; // of a product
constexpr int64_t kKeys = 64;    // of a product
constexpr int64_t kMinSlice = 512;
constexpr int64_t kUnits = 16; // enough for the threads of a desktop to share

// How an op is cut: a unit is a head of the cache, a block of queries and a slice of the keys.
struct Cut {
    int64_t d_k, d_v, n_kv, n_queries, n_head, n_head_kv, n_share;
    int64_t block, n_blocks; // queries of a block
    int64_t slice, n_slices; // keys of a slice
    int64_t rows;            // lanes of a product, a multiple of 16

    explicit Cut(const ggml_tensor * dst) {
        const ggml_tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2];
        d_k = k->ne[0], d_v = v->ne[0], n_kv = k->ne[1];
        n_queries = q->ne[1], n_head = q->ne[2], n_head_kv = k->ne[2];
        n_share = n_head / n_head_kv;
        block = std::min(n_queries, std::max<int64_t>(1, kMaxRows / n_share));
        n_blocks = (n_queries + block - 1) / block;
        rows = pad(block * n_share, 16);
        const int64_t units = n_head_kv * n_blocks;
        n_slices = std::clamp(std::min(n_kv / kMinSlice, kUnits / units), (int64_t) 1, kUnits);
        slice = pad((n_kv + n_slices - 1) / n_slices, kKeys);
        n_slices = (n_kv + slice - 1) / slice;
    }
    int64_t n_units() const { return n_head_kv * n_blocks * n_slices; }
    int64_t partial() const { return d_v + 2; } // floats of a row of a slice: what it says, its maximum, its sum
};

struct Work {
    float * query;             // [rows / panel][d_k][panel], scaled
    float * keys;              // [kKeys][max(d_k, d_v)], of values too
    float * scores;            // [kKeys][rows]
    float * said;              // [d_v][rows]
    float * by_row;            // [rows][d_v]
    float *max, *sum, *factor; // [rows]
    float * partials;          // of all threads: [n_slices][n_queries][n_head][partial]; none with one slice

    Work(Scratch & s, const Cut & c, int ith, int nth) {
        const auto own = [&](int64_t n) {
            float * all = s.take<float>(nth * pad(n, 16));
            return all ? all + ith * pad(n, 16) : nullptr;
        };
        query = own(c.d_k * c.rows);
        keys = own(kKeys * std::max(c.d_k, c.d_v));
        scores = own(kKeys * c.rows);
        said = own(c.d_v * c.rows);
        by_row = own(c.d_v * c.rows);
        max = own(c.rows);
        sum = own(c.rows);
        factor = own(c.rows);
        partials = s.take<float>(c.n_slices > 1 ? c.n_slices * c.n_queries * c.n_head * c.partial() : 0);
    }
};

// scores [tile_rows][kKeys] = query [tile_rows][d] . keys
template <int tile_rows>
void score_tiles(int64_t n_keys, int64_t d, const float * query, const float * keys, int64_t stride, float * scores) {
#if defined(PF_FLOAT_LANES)
    constexpr int n_sums = PF_FLOAT_LANES, tile_keys = n_sums / tile_rows;
    for (int64_t j = 0; j < n_keys; j += tile_keys) {
        const float * key[tile_keys];
        for (int b = 0; b < tile_keys; ++b) {
            key[b] = keys + std::min(j + b, n_keys - 1) * stride; // beyond the last: the last again
        }
        tree_vec sum[n_sums] = {};
        for (int64_t t = 0; t < d; t += PF_FLOAT_LANES) {
            tree_vec q[tile_rows];
            for (int a = 0; a < tile_rows; ++a) {
                q[a] = tree_vec_load(query + a * d + t);
            }
#pragma GCC unroll 16
            for (int b = 0; b < tile_keys; ++b) {
                const tree_vec k = tree_vec_load(key[b] + t);
#pragma GCC unroll 4
                for (int a = 0; a < tile_rows; ++a) {
                    sum[a * tile_keys + b] = tree_vec_fma(sum[a * tile_keys + b], q[a], k);
                }
            }
        }
        float sums[n_sums];
        tree_vec_store(sums, sums_of_lanes(sum));
        for (int a = 0; a < tile_rows; ++a) {
            memcpy(scores + a * kKeys + j, sums + a * tile_keys, tile_keys * sizeof(float));
        }
    }
#else
    for (int64_t j = 0; j < n_keys; ++j) {
        tree_dots(1, tile_rows, (int) d, keys + j * stride, query, scores + j, kKeys);
    }
#endif
}

enum class Seen { nothing, part, all };

// What n queries see of n_keys keys.
Seen look(const ggml_tensor * mask, int64_t query, int64_t n, int64_t key, int64_t n_keys) {
    constexpr uint16_t closed = 0xfc00;
    bool any_open = false, all_open = true;
    for (int64_t i = query; i < query + n; ++i) {
        const uint16_t * m = (const uint16_t *) ((const char *) mask->data + i * mask->nb[1]) + key;
        uint16_t set = 0, unclosed = 0;
        for (int64_t j = 0; j < n_keys; ++j) {
            set |= m[j];
            unclosed |= m[j] ^ closed;
        }
        all_open &= set == 0;
        any_open |= unclosed != 0;
    }
    return all_open ? Seen::all : any_open ? Seen::part : Seen::nothing;
}

void nothing_said(const Work & w, int64_t rows) {
    std::fill(w.max, w.max + rows, -FLT_MAX);
    std::fill(w.sum, w.sum + rows, 0.0f);
}

// Calls visit(key, n_keys, seen) for every block of keys that some of n queries see.
template <class Visit>
void each_block_seen(const ggml_tensor * dst, int64_t first, int64_t n, int64_t key_begin, int64_t key_end,
                     Visit && visit) {
    for (int64_t key = key_begin; key < key_end; key += kKeys) {
        const int64_t n_keys = std::min(kKeys, key_end - key);
        const Seen seen = look(dst->src[3], first, n, key, n_keys);
        if (seen != Seen::nothing) {
            visit(key, n_keys, seen);
        }
    }
}

// One unit's rows: row i * n_share + h is head h of the unit's query i.
void attend(const ggml_tensor * dst, const Cut & c, const Work & w, int64_t head_kv, int64_t first, int64_t n,
            int64_t key_begin, int64_t key_end) {
    const ggml_tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2], *mask = dst->src[3];
    const int64_t rows = pad(n * c.n_share, 16);
    float scale;
    memcpy(&scale, dst->op_params, sizeof scale);

    memset(w.query, 0, c.d_k * rows * sizeof(float));
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t h = 0; h < c.n_share; ++h) {
            const float * from = row_of(q, first + i, head_kv * c.n_share + h);
            const int64_t r = i * c.n_share + h, panel = r / tree_panel;
            float * to = w.query + panel * tree_panel * c.d_k + r % tree_panel;
            // The last panel may be half as wide.
            const int64_t width = std::min<int64_t>(tree_panel, rows - panel * tree_panel);
            for (int64_t d = 0; d < c.d_k; ++d) {
                to[d * width] = from[d] * scale;
            }
        }
    }
    nothing_said(w, rows);
    memset(w.said, 0, c.d_v * rows * sizeof(float));

    each_block_seen(dst, first, n, key_begin, key_end, [&](int64_t key, int64_t n_keys, Seen seen) {
        int64_t stride;
        const float * rows_k = rows_of_cache(k, head_kv, key, n_keys, kKeys, w.keys, &stride);
        for (int64_t p = 0; p < rows; p += tree_panel) {
            const int64_t width = std::min<int64_t>(tree_panel, rows - p);
            tree_gemm((int) n_keys, (int) width, (int) c.d_k, {rows_k, stride, 1}, w.query + p * c.d_k, width, 0, 0.0f,
                      w.scores + p, rows);
        }
        if (seen == Seen::part) {
            for (int64_t i = 0; i < n; ++i) {
                const ggml_fp16_t * m =
                    (const ggml_fp16_t *) ((const char *) mask->data + (first + i) * mask->nb[1]) + key;
                for (int64_t j = 0; j < n_keys; ++j) {
                    if (m[j] != 0) {
                        const float add = GGML_CPU_FP16_TO_FP32(m[j]);
                        for (int64_t h = 0; h < c.n_share; ++h) {
                            w.scores[j * rows + i * c.n_share + h] += add;
                        }
                    }
                }
            }
        }

        memcpy(w.factor, w.max, rows * sizeof(float));
        for (int64_t j = 0; j < n_keys; ++j) {
            const float * s = w.scores + j * rows;
            for (int64_t r = 0; r < rows; ++r) {
                w.max[r] = s[r] > w.max[r] ? s[r] : w.max[r];
            }
        }
        bool higher = false;
        for (int64_t r = 0; r < rows; ++r) {
            higher |= w.max[r] > w.factor[r];
            w.factor[r] -= w.max[r];
        }
        for (int64_t j = 0; j < n_keys; ++j) {
            float * s = w.scores + j * rows;
            for (int64_t r = 0; r < rows; ++r) {
                s[r] -= w.max[r];
            }
        }
        ggml_vec_soft_max_f32((int) (n_keys * rows), w.scores, w.scores, 0.0f);
        if (higher) {
            ggml_vec_soft_max_f32((int) rows, w.factor, w.factor, 0.0f);
            for (int64_t r = 0; r < rows; ++r) {
                w.sum[r] *= w.factor[r];
            }
            for (int64_t d = 0; d < c.d_v; ++d) {
                for (int64_t r = 0; r < rows; ++r) {
                    w.said[d * rows + r] *= w.factor[r];
                }
            }
        }
        for (int64_t j = 0; j < n_keys; ++j) {
            const float * s = w.scores + j * rows;
            for (int64_t r = 0; r < rows; ++r) {
                w.sum[r] += s[r];
            }
        }
        const float * rows_v = rows_of_cache(v, head_kv, key, n_keys, kKeys, w.keys, &stride);
        tree_gemm((int) c.d_v, (int) rows, (int) n_keys, {rows_v, 1, stride}, w.scores, rows, tree_panel, 1.0f, w.said,
                  rows);
    });
    tree_transpose((int) c.d_v, (int) rows, w.said, rows, w.by_row, c.d_v);
}

float max_of(const float * x, int64_t n) {
    float lane[16];
    std::fill_n(lane, 16, -FLT_MAX);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        for (int l = 0; l < 16; ++l) {
            lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
        }
    }
    float max = *std::max_element(lane, lane + 16);
    for (; i < n; ++i) {
        max = x[i] > max ? x[i] : max;
    }
    return max;
}

// The same for fewer than kMinRows rows, in other shapes: query [rows][d_k], scores [rows][kKeys], by_row [rows][d_v].
void attend_few(const ggml_tensor * dst, const Cut & c, const Work & w, int64_t head_kv, int64_t first, int64_t n,
                int64_t key_begin, int64_t key_end) {
    const ggml_tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2], *mask = dst->src[3];
    const int64_t rows = n * c.n_share;
    float scale;
    memcpy(&scale, dst->op_params, sizeof scale);

    for (int64_t r = 0; r < pad(rows, 4); ++r) {
        const int64_t same = std::min(r, rows - 1);
        const float * from = row_of(q, first + same / c.n_share, head_kv * c.n_share + same % c.n_share);
        for (int64_t d = 0; d < c.d_k; ++d) {
            w.query[r * c.d_k + d] = from[d] * scale;
        }
    }
    nothing_said(w, rows);
    memset(w.by_row, 0, c.d_v * rows * sizeof(float));

    each_block_seen(dst, first, n, key_begin, key_end, [&](int64_t key, int64_t n_keys, Seen seen) {
        int64_t stride;
        const float * rows_k = rows_of_cache(k, head_kv, key, n_keys, kKeys, w.keys, &stride);
        int64_t r = 0;
        for (; r + 2 < rows; r += 4) {
            score_tiles<4>(n_keys, c.d_k, w.query + r * c.d_k, rows_k, stride, w.scores + r * kKeys);
        }
        if (r < rows) {
            score_tiles<2>(n_keys, c.d_k, w.query + r * c.d_k, rows_k, stride, w.scores + r * kKeys);
        }
        for (r = 0; r < rows; ++r) {
            float * s = w.scores + r * kKeys;
            if (seen == Seen::part) {
                const int64_t i = first + r / c.n_share;
                const ggml_fp16_t * m = (const ggml_fp16_t *) ((const char *) mask->data + i * mask->nb[1]) + key;
                for (int64_t j = 0; j < n_keys; ++j) {
                    s[j] += GGML_CPU_FP16_TO_FP32(m[j]);
                }
            }
            const float max = std::max(w.max[r], max_of(s, n_keys));
            if (max > w.max[r]) {
                const float factor = std::exp(w.max[r] - max);
                w.max[r] = max;
                w.sum[r] *= factor;
                ggml_vec_scale_f32((int) c.d_v, w.by_row + r * c.d_v, factor);
            }
            w.sum[r] += (float) ggml_vec_soft_max_f32((int) n_keys, s, s, max);
        }
        const float * rows_v = rows_of_cache(v, head_kv, key, n_keys, kKeys, w.keys, &stride);
        tree_gemm((int) rows, (int) c.d_v, (int) n_keys, {w.scores, kKeys, 1}, rows_v, stride, tree_panel, 1.0f,
                  w.by_row, c.d_v);
    });
}

float * row_said(ggml_tensor * dst, const Cut & c, int64_t query, int64_t head) {
    return (float *) ((char *) dst->data + (query * c.n_head + head) * dst->nb[1]);
}

// Divides a row by its sum: nothing seen says nothing.
void say(float * to, const float * from, int64_t n, float sum) {
    const float by = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (int64_t d = 0; d < n; ++d) {
        to[d] = from[d] * by;
    }
}

void put_together(ggml_tensor * dst, const Cut & c, const float * partials, int64_t row) {
    const int64_t stride = c.n_queries * c.n_head * c.partial();
    const float * first = partials + row * c.partial();
    float max = -FLT_MAX, sum = 0.0f;
    for (int64_t s = 0; s < c.n_slices; ++s) {
        max = std::max(max, first[s * stride + c.d_v]);
    }
    float * to = row_said(dst, c, row / c.n_head, row % c.n_head);
    std::fill(to, to + c.d_v, 0.0f);
    for (int64_t s = 0; s < c.n_slices; ++s) {
        const float * part = first + s * stride;
        const float weight = std::exp(part[c.d_v] - max);
        sum += weight * part[c.d_v + 1];
        for (int64_t d = 0; d < c.d_v; ++d) {
            to[d] += weight * part[d];
        }
    }
    say(to, to, c.d_v, sum);
}

bool is_ours(const ggml_tensor * dst) {
    const ggml_tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2], *mask = dst->src[3];
    const float * bias_and_cap = (const float *) dst->op_params + 1;
    return mask && !dst->src[4] && bias_and_cap[0] == 0.0f && bias_and_cap[1] == 0.0f && q->type == GGML_TYPE_F32 &&
           unpacks_cache(k->type) && unpacks_cache(v->type) && q->ne[3] == 1 && k->ne[3] == 1 && mask->ne[2] == 1 &&
           mask->ne[3] == 1 && k->ne[2] == v->ne[2] && k->ne[0] % 16 == 0 && v->ne[0] % 16 == 0 &&
           q->ne[1] * (q->ne[2] / k->ne[2]) >= 2;
}

} // namespace

size_t ggml_gqa_attention_work_size(int n_tasks, const ggml_tensor * dst) {
    if (!is_ours(dst)) {
        return 0;
    }
    Scratch count{nullptr};
    Work(count, Cut(dst), 0, n_tasks);
    return count.used + 64;
}

bool ggml_compute_forward_gqa_attention(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->use_ref || !is_ours(dst)) {
        return false;
    }
    const Cut c(dst);
    Scratch scratch = shared_scratch(params, ggml_gqa_attention_work_size(params->nth, dst) - 64);
    const Work w(scratch, c, params->ith, params->nth);
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    for (int64_t unit = params->ith; unit < c.n_units(); unit = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t slice = unit % c.n_slices, block = unit / c.n_slices % c.n_blocks;
        const int64_t head_kv = unit / c.n_slices / c.n_blocks;
        const int64_t first = block * c.block, n = std::min(c.block, c.n_queries - first);
        (n * c.n_share < kMinRows ? attend_few : attend)(dst, c, w, head_kv, first, n, slice * c.slice,
                                                         std::min((slice + 1) * c.slice, c.n_kv));
        for (int64_t r = 0; r < n * c.n_share; ++r) {
            const int64_t query = first + r / c.n_share, head = head_kv * c.n_share + r % c.n_share;
            const float * from = w.by_row + r * c.d_v;
            if (c.n_slices == 1) {
                say(row_said(dst, c, query, head), from, c.d_v, w.sum[r]);
            } else {
                float * to = w.partials + ((slice * c.n_queries + query) * c.n_head + head) * c.partial();
                memcpy(to, from, c.d_v * sizeof(float));
                to[c.d_v] = w.max[r];
                to[c.d_v + 1] = w.sum[r];
            }
        }
    }
    if (c.n_slices > 1) {
        ggml_barrier(params->threadpool);
        const Range share = thread_share(params, c.n_queries * c.n_head);
        for (int64_t row = share.begin; row < share.end; ++row) {
            put_together(dst, c, w.partials, row);
        }
    }
    return true;
}
