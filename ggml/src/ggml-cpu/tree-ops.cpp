// The tree ops of ggml-tree.h on the CPU: the recurrent ones here, those of step-ops.h by call.
//
// Owns: the order of the computation and how threads share it. Threads take ranges of (value head, 16 value columns),
// which never meet before the results, and each sums in an order that does not depend on the range: results are the
// same bits for any number of threads. Refuses nothing: the builders have checked the operands, and entries of parent
// and path that make no sense read as -1.
#include "tree-ops.h"

#include "ggml-tree.h"
#include "step-ops.h"
#include "tree-gemm.h"
#include "tree-work.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

// A decay below this is taken as 0: it cannot show in an f32 sum, and denormals are slow to multiply.
constexpr float kNoDecayLeft = 1e-30f;
constexpr int64_t kColumns = 16;  // value columns are shared out in blocks of this many
constexpr int kRun = 32;          // nodes of a run of a long chain: a fifth faster than 64 at d = 32, 6% at d = 128
constexpr int kLongRowNodes = 16; // up to this many nodes, walking the state in long rows is the faster update

// ---------------------------------------------------------------------------------------------- ggml_ssm_conv_tree

constexpr int64_t kConvBlock = 256; // channels whose taps are transposed at a time

// A thread's channels: 64 or a multiple, but for the last.
Range channel_share(const ggml_compute_params * params, int64_t channels) {
    const Range lines = thread_share(params, pad(channels, 64) / 64);
    return {lines.begin * 64, std::min(lines.end * 64, channels)};
}

struct ConvWork {
    float * taps; // [block, K]

    ConvWork(Scratch & s, int64_t n_taps) : taps(s.take<float>(kConvBlock * n_taps)) {}
};

// the columns that the taps of node i meet, oldest first
void conv_sources(const ggml_tensor * state, const ggml_tensor * x, const int32_t * parent, int64_t i, int n_taps,
                  const float ** source) {
    int32_t node = (int32_t) i;
    int committed = n_taps - 2; // newest row of the state
    for (int tap = n_taps - 1; tap >= 0; --tap) {
        if (node < 0) {
            source[tap] = row_of(state, committed--);
            continue;
        }
        source[tap] = row_of(x, node);
        node = parent[node] < node ? std::max(parent[node], -1) : -1;
    }
}

void conv_tree(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * state = dst->src[0];
    const ggml_tensor * x = dst->src[1];
    const ggml_tensor * kernel = dst->src[2];
    const int32_t * parent = (const int32_t *) dst->src[3]->data;

    const int n_taps = (int) kernel->ne[0];
    const int64_t channels = x->ne[0];

    Scratch count{nullptr};
    ConvWork(count, n_taps);
    Scratch scratch = scratch_of(params, count.used);
    const ConvWork work(scratch, n_taps);

    const Range share = channel_share(params, channels);
    for (int64_t c0 = share.begin; c0 < share.end; c0 += kConvBlock) {
        const int n = (int) std::min(kConvBlock, share.end - c0);
        tree_transpose(n, n_taps, row_of(kernel, c0), n_taps, work.taps, kConvBlock);

        for (int64_t i = 0; i < x->ne[1]; ++i) {
            const float * source[GGML_TREE_MAX_TAPS];
            conv_sources(state, x, parent, i, n_taps, source);
            float * out = row_of(dst, i) + c0;
            int c = 0;
            for (; c + tree_vec_len <= n; c += tree_vec_len) {
                tree_vec sum = tree_vec_zero;
                for (int tap = 0; tap < n_taps; ++tap) {
                    sum = tree_vec_fma(sum, tree_vec_load(source[tap] + c0 + c),
                                       tree_vec_load(work.taps + tap * kConvBlock + c));
                }
                tree_vec_store(out + c, sum);
            }
            for (; c < n; ++c) {
                float sum = 0.0f;
                for (int tap = 0; tap < n_taps; ++tap) {
                    sum += source[tap][c0 + c] * work.taps[tap * kConvBlock + c];
                }
                out[c] = sum;
            }
        }
    }
}

// -------------------------------------------------------------------------------------- ggml_ssm_conv_tree_persist

void conv_tree_persist(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * x = dst->src[1];
    const ggml_tensor * path = dst->src[2];

    const int n_rows = (int) dst->ne[1];
    int32_t last[GGML_TREE_MAX_TAPS]; // of the path, backwards
    int n_new = 0;
    for (int64_t i = path->ne[0]; i-- > 0 && n_new < n_rows;) {
        const int32_t node = ((const int32_t *) path->data)[i];
        if (node >= 0 && node < x->ne[1]) {
            last[n_new++] = node;
        }
    }
    const Range share = channel_share(params, dst->ne[0]);
    if (n_new == 0 || share.begin >= share.end) {
        return;
    }
    for (int row = 0; row < n_rows; ++row) {
        const int from = row + n_new;
        const float * source = from < n_rows ? row_of(dst, from) : row_of(x, last[n_rows - 1 - row]);
        memcpy(row_of(dst, row) + share.begin, source + share.begin, (share.end - share.begin) * sizeof(float));
    }
}

// --------------------------------------------------------------------------------------- ggml_gated_delta_net_tree

// S[c] += over the nodes: S [n_columns, d] = scale S + x^T k, x [n, ldx] (already weighted), k [n, d]
void advance_state(float * s, int64_t d, int n_columns, int n, float scale, const float * x, int64_t ldx,
                   const float * k) {
    if (n <= kLongRowNodes) {
        tree_gemm_by_rows(n_columns, (int) d, n, {x, 1, ldx}, k, d, scale, s, d);
    } else {
        tree_gemm(n_columns, (int) d, n, {x, 1, ldx}, k, d, tree_panel, scale, s, d);
    }
}

struct DeltaNetWork {
    int64_t n_max;  // nodes of a run at most
    int64_t ld;     // row length of the node x node matrices
    int64_t n_cols; // k and q of a run side by side, padded to whole vectors

    float * rows;     // [2n, d]   k, then q, packed
    float * panels;   // [d, 2n]   the same transposed, in panels of tree_panel columns
    float * gram;     // [2n, ld]  k_j.k_i, then k_j.q_i, at [i][j]
    float * path;     // [n, ld]   D_ij: decay from j down to i, 1 on the diagonal, 0 where j is not on the path
    float * decay;    // [n]       decay from the committed state down to i
    float * beta;     // [n]
    float * solve;    // [n, ld]   -beta_i D_ij (k_j.k_i), strictly lower
    float * mix;      // [n, ld]   D_ij (k_j.q_i) / sqrt(d), lower
    float * reads_t;  // [dv, 2n]  S^T k_i, then S^T q_i
    float * reads;    // [2n, dv]  the same transposed
    float * delta;    // [n, dv]
    int32_t * parent; // [n]       within the run
    float * carried;  // [heads that share a key head, dv, d], for chains longer than a run

    DeltaNetWork(Scratch & s, const ggml_tensor * op) {
        const int64_t d = op->src[1]->ne[0], hk = op->src[1]->ne[1], n = op->src[1]->ne[2];
        const int64_t dv = op->src[2]->ne[0], hv = op->src[2]->ne[1];

        n_max = n <= GGML_TREE_MAX_NODES ? n : kRun;
        ld = pad(n_max, 16);
        n_cols = pad(2 * n_max, tree_vec_len);
        rows = s.take<float>(2 * n_max * d);
        panels = s.take<float>(pad(2 * n_max, tree_panel) * d);
        gram = s.take<float>(2 * n_max * ld);
        path = s.take<float>(n_max * ld);
        decay = s.take<float>(n_max);
        beta = s.take<float>(n_max);
        solve = s.take<float>(n_max * ld);
        mix = s.take<float>(n_max * ld);
        reads_t = s.take<float>(dv * n_cols);
        reads = s.take<float>(2 * n_max * dv);
        delta = s.take<float>(n_max * dv);
        parent = s.take<int32_t>(n_max);
        carried = s.take<float>(n > n_max ? (hv + hk - 1) / hk * dv * d : 0);
    }
};

// One run of nodes: [first, first + n) of the op's N.
struct Run {
    int64_t first;
    int n;
};

class DeltaNetTree {
  public:
    DeltaNetTree(ggml_tensor * dst, Scratch scratch)
        : q_(dst->src[0]), k_(dst->src[1]), v_(dst->src[2]), g_(dst->src[3]), beta_(dst->src[4]), state_(dst->src[5]),
          parent_((const int32_t *) dst->src[6]->data), d_(k_->ne[0]), dv_(v_->ne[0]), hk_(k_->ne[1]), hv_(v_->ne[1]),
          n_(v_->ne[2]), scale_(1.0f / std::sqrt((float) d_)), out_((float *) dst->data), delta_(out_ + dv_ * hv_ * n_),
          w_(scratch, dst) {}

    // Value columns [begin, end), counted over the value heads in key-head order so that heads with the same key
    // head follow each other and share what depends on q and k alone.
    void compute(Range columns) {
        int64_t at = 0;
        for (int64_t key_head = 0; key_head < hk_; ++key_head) {
            const int64_t n_heads = key_head < hv_ ? (hv_ - key_head + hk_ - 1) / hk_ : 0;
            const Range mine = {std::max(columns.begin - at, (int64_t) 0), std::min(columns.end - at, n_heads * dv_)};
            at += n_heads * dv_;
            if (mine.begin >= mine.end) {
                continue;
            }
            for (Run run = {0, 0}; run.first < n_; run.first += w_.n_max) {
                run.n = (int) std::min(n_ - run.first, w_.n_max);
                prepare(run, key_head);
                for (int64_t i = mine.begin / dv_; i * dv_ < mine.end; ++i) {
                    compute_head(run, key_head + i * hk_, i, std::max(mine.begin - i * dv_, (int64_t) 0),
                                 std::min(mine.end - i * dv_, dv_));
                }
            }
        }
    }

  private:
    const ggml_tensor *q_, *k_, *v_, *g_, *beta_, *state_;
    const int32_t * parent_;
    int64_t d_, dv_, hk_, hv_, n_;
    float scale_;
    float * out_;   // [dv, hv, n]
    float * delta_; // [dv, hv, n]
    DeltaNetWork w_;

    // So few that single dot products beat the packed product. They cost a sum over lanes each, so shorter rows pay less.
    bool few_nodes(int n) const { return n <= 2 + d_ / 64; }

    // what a key head's value heads have in common: packed q and k, their products, parents within the run
    void prepare(Run run, int64_t key_head) {
        const int n = run.n;
        for (int i = 0; i < n; ++i) {
            memcpy(w_.rows + i * d_, row_of(k_, key_head, run.first + i), d_ * sizeof(float));
            memcpy(w_.rows + (n + i) * d_, row_of(q_, key_head, run.first + i), d_ * sizeof(float));

            const int64_t p = parent_[run.first + i] - run.first;
            w_.parent[i] = p >= 0 && p < i ? (int32_t) p : -1;
        }
        if (few_nodes(n)) {
            tree_dots(n, 2 * n, (int) d_, w_.rows, w_.rows, w_.gram, w_.ld);
            return;
        }
        const int n_cols = (int) pad(2 * n, tree_vec_len);
        for (int j = 0; j < n_cols; j += tree_panel) {
            const int width = std::min(tree_panel, n_cols - j);
            const int filled = std::min(width, 2 * n - j);
            float * panel = w_.panels + j * d_;
            tree_transpose(filled, (int) d_, w_.rows + j * d_, d_, panel, tree_panel);
            for (int64_t t = 0; t < d_ && filled < width; ++t) {
                std::fill(panel + t * tree_panel + filled, panel + t * tree_panel + width, 0.0f);
            }
        }
        constexpr int block = tree_tile_rows;
        for (int i = 0; i < n; i += block) { // lower triangle, by blocks of rows
            const int m = std::min(block, n - i);
            const int width = (int) pad(i + m, tree_vec_len);
            for (int part = 0; part < 2; ++part) {
                const int row = part * n + i;
                tree_gemm(m, width, (int) d_, {w_.rows + row * d_, d_, 1}, w_.panels, tree_panel, tree_panel * d_, 0.0f,
                          w_.gram + row * w_.ld, w_.ld);
            }
        }
    }

    // the decays along the tree and the two triangular matrices made from them
    void weigh(Run run, int64_t head) {
        const int n = run.n;
        for (int i = 0; i < n; ++i) {
            const int p = w_.parent[i];
            const float step = std::exp(row_of(g_, run.first + i)[head]);
            const float beta = row_of(beta_, run.first + i)[head];

            float * path = w_.path + i * w_.ld;
            for (int j = 0; j < i; ++j) {
                const float decay = p < 0 ? 0.0f : step * w_.path[p * w_.ld + j];
                path[j] = decay < kNoDecayLeft ? 0.0f : decay;
            }
            std::fill(path + i, path + w_.ld, 0.0f);
            path[i] = 1.0f;

            const float decay = step * (p < 0 ? 1.0f : w_.decay[p]);
            w_.decay[i] = decay < kNoDecayLeft ? 0.0f : decay;
            w_.beta[i] = beta;

            const float * kk = w_.gram + i * w_.ld;
            const float * qk = w_.gram + (n + i) * w_.ld;
            for (int j = 0; j <= i; ++j) {
                w_.solve[i * w_.ld + j] = -beta * path[j] * kk[j];
                w_.mix[i * w_.ld + j] = scale_ * path[j] * qk[j];
            }
        }
    }

    // S^T k and S^T q of every node, for m columns of the state s [m, d]
    void read_state(int n, const float * s, int m) {
        if (few_nodes(n)) {
            tree_dots(m, 2 * n, (int) d_, s, w_.rows, w_.reads, dv_);
            return;
        }
        const int n_cols = (int) pad(2 * n, tree_vec_len);
        tree_gemm(m, n_cols, (int) d_, {s, d_, 1}, w_.panels, tree_panel, tree_panel * d_, 0.0f, w_.reads_t, n_cols,
                  true);
        tree_transpose(m, 2 * n, w_.reads_t, n_cols, w_.reads, dv_);
    }

    // value columns [c0, c1) of one value head; slot is its place among those that share its key head
    void compute_head(Run run, int64_t head, int64_t slot, int64_t c0, int64_t c1) {
        const int n = run.n;
        const int m = (int) (c1 - c0);
        float * carried = w_.carried + (slot * dv_ + c0) * d_;
        const float * given = row_of(state_, c0, head);

        weigh(run, head);
        read_state(n, run.first == 0 ? given : carried, m);

        float * q_reads = w_.reads + n * dv_;
        for (int i = 0; i < n; ++i) {
            const float * v = row_of(v_, head, run.first + i) + c0;
            const float beta = w_.beta[i];
            const float decay = w_.decay[i];
            for (int c = 0; c < m; ++c) {
                w_.delta[i * dv_ + c] = beta * (v[c] - decay * w_.reads[i * dv_ + c]);
                q_reads[i * dv_ + c] *= scale_ * decay;
            }
        }
        constexpr int block = 4;
        for (int i = 0; i < n; i += block) {
            const int rows = std::min(block, n - i);
            // forward substitution: first everything above the block, then inside it
            tree_gemm(rows, m, i, {w_.solve + i * w_.ld, w_.ld, 1}, w_.delta, dv_, tree_panel, 1.0f, w_.delta + i * dv_,
                      dv_);
            for (int j = i + 1; j < i + rows; ++j) {
                tree_gemm(1, m, j - i, {w_.solve + j * w_.ld + i, w_.ld, 1}, w_.delta + i * dv_, dv_, tree_panel, 1.0f,
                          w_.delta + j * dv_, dv_);
            }
        }
        constexpr int out_block = tree_tile_rows;
        for (int i = 0; i < n; i += out_block) {
            const int rows = std::min(out_block, n - i);
            for (int j = i; j < i + rows;
                 ++j) { // the tile below reads whole blocks: clear what lies above the diagonal
                std::fill(w_.mix + j * w_.ld + j + 1, w_.mix + j * w_.ld + i + rows, 0.0f);
            }
            tree_gemm(rows, m, i + rows, {w_.mix + i * w_.ld, w_.ld, 1}, w_.delta, dv_, tree_panel, 1.0f,
                      q_reads + i * dv_, dv_);
        }
        for (int i = 0; i < n; ++i) {
            const int64_t at = ((run.first + i) * hv_ + head) * dv_ + c0;
            memcpy(out_ + at, q_reads + i * dv_, m * sizeof(float));
            memcpy(delta_ + at, w_.delta + i * dv_, m * sizeof(float));
        }
        if (run.first + n == n_) {
            return;
        }
        if (run.first == 0) {
            memcpy(carried, given, m * d_ * sizeof(float));
        }
        const float * last = w_.path + (n - 1) * w_.ld;
        for (int i = 0; i < n; ++i) {
            for (int c = 0; c < m; ++c) {
                w_.delta[i * dv_ + c] *= last[i];
            }
        }
        advance_state(carried, d_, m, n, w_.decay[n - 1], w_.delta, dv_, w_.rows);
    }
};

void delta_net_tree(const ggml_compute_params * params, ggml_tensor * dst) {
    Scratch count{nullptr};
    DeltaNetWork(count, dst);

    const ggml_tensor * v = dst->src[2];
    const Range share = thread_share(params, v->ne[0] * v->ne[1] / kColumns);
    DeltaNetTree(dst, scratch_of(params, count.used)).compute({share.begin * kColumns, share.end * kColumns});
}

// ------------------------------------------------------------------------------- ggml_gated_delta_net_tree_persist

constexpr int kPersistNodes = 64; // nodes packed at a time

struct PersistWork {
    int32_t * path; // [P]       the entries that count
    float * weight; // [P]       decay from each node down to the last
    float * k;      // [nodes, d]
    float * delta;  // [nodes, dv], weighted

    PersistWork(Scratch & s, const ggml_tensor * op) {
        const int64_t n_path = op->src[4]->ne[0];
        const int64_t nodes = std::min<int64_t>(n_path, kPersistNodes);
        path = s.take<int32_t>(n_path);
        weight = s.take<float>(n_path);
        k = s.take<float>(nodes * op->src[1]->ne[0]);
        delta = s.take<float>(nodes * op->src[2]->ne[0]);
    }
};

void delta_net_tree_persist(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * delta = dst->src[2];
    const ggml_tensor * g = dst->src[3];
    const ggml_tensor * path = dst->src[4];

    const int64_t d = k->ne[0], hk = k->ne[1];
    const int64_t dv = delta->ne[0], hv = delta->ne[1], n = delta->ne[2];

    Scratch count{nullptr};
    PersistWork(count, dst);
    Scratch scratch = scratch_of(params, count.used);
    const PersistWork w(scratch, dst);

    int64_t n_path = 0;
    for (int64_t i = 0; i < path->ne[0]; ++i) {
        const int32_t node = ((const int32_t *) path->data)[i];
        if (node >= 0 && node < n) {
            w.path[n_path++] = node;
        }
    }
    if (n_path == 0) {
        return;
    }
    const Range share = thread_share(params, hv * dv / kColumns);
    for (int64_t at = share.begin * kColumns; at < share.end * kColumns;) {
        const int64_t head = at / dv;
        const int64_t c0 = at % dv;
        const int m = (int) (std::min(share.end * kColumns, (head + 1) * dv) - at);
        at += m;

        float decay = 1.0f;
        int64_t first = n_path; // nodes before it have decayed to nothing
        for (int64_t i = n_path; i-- > 0;) {
            w.weight[i] = decay;
            first = decay > 0.0f ? i : first;
            decay *= std::exp(row_of(g, w.path[i])[head]);
            decay = decay < kNoDecayLeft ? 0.0f : decay;
        }
        float * s = row_of(dst, c0, head);
        for (int64_t i0 = first; i0 < n_path; i0 += kPersistNodes) {
            const int nodes = (int) std::min<int64_t>(n_path - i0, kPersistNodes);
            for (int i = 0; i < nodes; ++i) {
                const int32_t node = w.path[i0 + i];
                memcpy(w.k + i * d, row_of(k, head % hk, node), d * sizeof(float));
                const float * x = row_of(delta, head, node) + c0;
                for (int c = 0; c < m; ++c) {
                    w.delta[i * m + c] = w.weight[i0 + i] * x[c];
                }
            }
            advance_state(s, d, m, nodes, i0 == first ? decay : 1.0f, w.delta, m, w.k);
        }
    }
}

} // namespace

size_t ggml_tree_op_work_size(const ggml_tensor * node, int n_tasks) {
    Scratch count{nullptr};
    switch (node->op) {
    case GGML_OP_SSM_CONV_TREE:
        ConvWork(count, node->src[2]->ne[0]);
        break;
    case GGML_OP_GATED_DELTA_NET_TREE:
        DeltaNetWork(count, node);
        break;
    case GGML_OP_GATED_DELTA_NET_TREE_PERSIST:
        PersistWork(count, node);
        break;
    case GGML_OP_SSM_CONV_TREE_PERSIST:
    case GGML_OP_TREE_MASK:
    case GGML_OP_BLOCK_MASK:
        break;
    case GGML_OP_TOP_K_LOGP:
        return ggml_top_k_logp_work_size(node) + 64;
    default:
        GGML_ABORT("not a tree op: %s", ggml_op_name(node->op));
    }
    return count.used * n_tasks + 64; // 64 to align the first piece
}

void ggml_compute_forward_tree_op(const ggml_compute_params * params, ggml_tensor * dst) {
    switch (dst->op) {
    case GGML_OP_SSM_CONV_TREE:
        conv_tree(params, dst);
        break;
    case GGML_OP_SSM_CONV_TREE_PERSIST:
        conv_tree_persist(params, dst);
        break;
    case GGML_OP_GATED_DELTA_NET_TREE:
        delta_net_tree(params, dst);
        break;
    case GGML_OP_GATED_DELTA_NET_TREE_PERSIST:
        delta_net_tree_persist(params, dst);
        break;
    case GGML_OP_TREE_MASK:
        ggml_compute_forward_tree_mask(params, dst);
        break;
    case GGML_OP_BLOCK_MASK:
        ggml_compute_forward_block_mask(params, dst);
        break;
    case GGML_OP_TOP_K_LOGP:
        ggml_compute_forward_top_k_logp(params, dst);
        break;
    default:
        GGML_ABORT("not a tree op: %s", ggml_op_name(dst->op));
    }
}
