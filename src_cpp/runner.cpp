#include "runner.h"

#include <algorithm>
#include <numeric>

#include "error.h"
#include "ggml-tree.h"

namespace pf {

namespace {

constexpr int32_t chunk_granule = 64;

// Nodes in the largest graph of a pair: a qwen35 layer takes about 60 with the saving of a tree, a drafter layer 35.
size_t max_graph_nodes(const Target & target, const Drafter * drafter) {
    return 512 + 96 * (size_t) std::max(target.n_layer, drafter ? drafter->n_layer : 0);
}

enum Kind : int64_t { kind_pass, kind_commit, kind_append, kind_draft };

CommitInputs commit_inputs(const GraphBuilder & b, const StateShape & shape, int64_t n_nodes, bool move_rows) {
    CommitInputs in;
    if (shape.n_recurrent > 0) {
        in.path = b.input(GGML_TYPE_I32, n_nodes);
        in.conv_tail = b.input(GGML_TYPE_I32, shape.conv_width - 1);
        in.conv_from = b.input(GGML_TYPE_I32, shape.conv_width - 1);
    }
    if (move_rows) {
        in.kv_from = b.input(GGML_TYPE_I32, n_nodes);
        in.kv_to = b.input(GGML_TYPE_I64, n_nodes);
        in.ring_from = b.input(GGML_TYPE_I32, n_nodes);
        in.ring_to = b.input(GGML_TYPE_I64, n_nodes);
    }
    return in;
}

StateParams state_params(const Drafter * drafter, const pf_session_params & p) {
    StateParams s;
    s.n_ctx = p.n_ctx;
    s.type_k = (ggml_type) p.type_k;
    s.type_v = (ggml_type) p.type_v;
    if (drafter) {
        // With an f32 target cache drafting is f32 throughout, else half precision will do.
        s.n_taps = (int) drafter->taps.size();
        s.n_ring = p.n_ring;
        s.type_ring = s.type_k == GGML_TYPE_F32 ? GGML_TYPE_F32 : GGML_TYPE_BF16;
    }
    return s;
}

} // namespace

int32_t node_bucket(int32_t n) {
    if (n >= chunk_granule) {
        return (int32_t) round_up(n, chunk_granule);
    }
    int32_t bucket = 1;
    while (bucket < n) {
        bucket *= 2;
    }
    return bucket;
}

struct Runner::PassGraph : Graph {
    PassInputs in;
    CommitInputs commit;
    PassOutputs out;
};
struct Runner::CommitGraph : Graph {
    CommitInputs in;
};
struct Runner::AppendGraph : Graph {
    AppendInputs in;
};
struct Runner::DraftGraph : Graph {
    DraftInputs in;
    ggml_tensor * logits = nullptr; // [n_vocab, n_depth]
};

Runner::Runner(const Target & target, const Drafter * drafter, const pf_session_params & params)
    : target_(target), drafter_(drafter), max_nodes_(std::max(params.n_batch, PF_MAX_NODES)),
      compute_(target.device(), params.n_threads, max_graph_nodes(target, drafter)),
      state_(target.state_shape, state_params(drafter, params), compute_.backend()),
      mask_(state_.n_rows * max_nodes_, compute_.backend()) {
    if (drafter_) {
        const ggml_type type = state_.params.type_k == GGML_TYPE_F32 ? GGML_TYPE_F32 : GGML_TYPE_F16;
        draft_cache_ =
            std::make_unique<DraftCache>(drafter_->n_layer, (int64_t) drafter_->n_head_kv * drafter_->head_dim,
                                         drafter_->block_size, state_.params.n_ring, type, compute_.backend());
        draft_mask_.resize((size_t) (drafter_->block_size * draft_cache_->n_slots));
    }
    i32_.resize((size_t) max_nodes_);
    i64_.resize((size_t) max_nodes_);
    embd_.resize((size_t) max_nodes_ * (size_t) target_.n_embd);
}

Runner::~Runner() = default;

void Runner::clear() {
    state_.clear();
    mask_.forget();
}

void Runner::reserve_tree(int32_t n_nodes) {
    if (n_nodes > state_.max_nodes) {
        compute_.drop_graphs(); // they point at the old scratch
        state_.reserve_tree(n_nodes);
    }
}

const PassOutputs & Runner::pass(const Nodes & nodes, int64_t n, const PassOptions & options) {
    const int64_t n_nodes = nodes.n, n_kv = std::min(round_up(n + n_nodes, kv_granule), state_.n_rows);
    const int64_t flags =
        options.commit | options.logits << 1 | (options.taps != nullptr) << 2 | (options.capture != nullptr) << 3;
    PassGraph & g =
        compute_.graph<PassGraph>({kind_pass, n_nodes, n_kv, flags}, [&](const GraphBuilder & b, PassGraph & graph) {
            graph.in.embd = b.input(GGML_TYPE_F32, target_.n_embd, n_nodes);
            graph.in.pos = b.input(GGML_TYPE_I32, n_nodes);
            graph.in.parent = b.input(GGML_TYPE_I32, n_nodes);
            graph.in.kv_rows = b.input(GGML_TYPE_I64, n_nodes);
            graph.in.ring_rows = b.input(GGML_TYPE_I64, n_nodes);
            graph.in.mask = mask_.view(b.ctx, n_kv, n_nodes);
            if (options.commit) {
                graph.commit = commit_inputs(b, target_.state_shape, n_nodes, false);
            }
            if (options.capture) {
                graph.out.hidden.resize(options.capture->size());
            }
            target_.build_pass(b, graph.in, graph.commit, state_, options, graph.out);
        });

    embed_rows(target_.token_embd(), nodes.token.data(), n_nodes, embd_.data());
    set_input(g.in.embd, embd_.data());
    set_input(g.in.parent, nodes.parent.data());
    const auto fill = [&](ggml_tensor * rows, int64_t modulus) {
        for (int64_t i = 0; i < n_nodes; ++i) {
            i64_[(size_t) i] = (n + i) % modulus;
        }
        set_input(rows, i64_.data());
    };
    fill(g.in.kv_rows, INT64_MAX);
    fill(g.in.ring_rows, std::max<int64_t>(1, state_.params.n_ring));
    for (int64_t i = 0; i < n_nodes; ++i) {
        i32_[(size_t) i] = (int32_t) n + nodes.depth[(size_t) i];
    }
    set_input(g.in.pos, i32_.data());
    mask_.write(g.in.mask, n, nodes.parent.data());
    if (options.commit) {
        path_.resize((size_t) nodes.n_real);
        std::iota(path_.begin(), path_.end(), 0);
        fill_commit(g.commit, nodes.n, path_.data(), nodes.n_real, n);
    }
    compute_.run(g);
    return g.out;
}

void Runner::commit(const int32_t * path, int32_t n_path, int32_t n_nodes, int64_t n) {
    // Trees are numbered rank-0 path first: as long as the path follows it, every row is where it belongs.
    const bool move = path[n_path - 1] != n_path - 1;
    CommitGraph & g =
        compute_.graph<CommitGraph>({kind_commit, n_nodes, move, 0}, [&](const GraphBuilder & b, CommitGraph & graph) {
            graph.in = commit_inputs(b, target_.state_shape, n_nodes, move);
            state_.commit_tree(b, n_nodes, graph.in);
        });
    fill_commit(g.in, n_nodes, path, n_path, n);
    compute_.run(g);
}

void Runner::fill_commit(const CommitInputs & in, int32_t n_nodes, const int32_t * path, int32_t n_path, int64_t n) {
    const int32_t taps = target_.state_shape.conv_width - 1;
    int32_t tail[GGML_TREE_MAX_TAPS], from[GGML_TREE_MAX_TAPS];
    for (int32_t r = 0; r < taps; ++r) {
        // New row r is entry n_path + r of (old rows, path).
        const int32_t entry = n_path + r;
        tail[r] = entry >= taps ? path[entry - taps] : 0;
        from[r] = entry >= taps ? taps + r : entry;
    }
    set_input(in.conv_tail, tail);
    set_input(in.conv_from, from);
    for (int32_t i = 0; i < n_nodes; ++i) {
        i32_[(size_t) i] = i < n_path ? path[i] : -1;
    }
    set_input(in.path, i32_.data());

    // Where nothing moves a row is copied onto itself: the root's, which always stays.
    const auto move = [&](ggml_tensor * rows_from, ggml_tensor * rows_to, int64_t modulus) {
        for (int32_t i = 0; i < n_nodes; ++i) {
            i32_[(size_t) i] = (int32_t) ((n + (i < n_path ? path[i] : 0)) % modulus);
            i64_[(size_t) i] = (n + (i < n_path ? i : 0)) % modulus;
        }
        set_input(rows_from, i32_.data());
        set_input(rows_to, i64_.data());
    };
    if (in.kv_from) {
        move(in.kv_from, in.kv_to, INT64_MAX);
        move(in.ring_from, in.ring_to, std::max<int64_t>(1, state_.params.n_ring));
    }
}

// ---- the drafter -------------------------------------------------------------------------------------------------

void Runner::append_context(int64_t first, int32_t count) {
    const int32_t n = node_bucket(count);
    AppendGraph & g =
        compute_.graph<AppendGraph>({kind_append, n, 0, 0}, [&](const GraphBuilder & b, AppendGraph & graph) {
            graph.in.ring_rows = b.input(GGML_TYPE_I32, n);
            graph.in.pos = b.input(GGML_TYPE_I32, n);
            graph.in.slots = b.input(GGML_TYPE_I64, n);
            drafter_->build_append(b, graph.in, state_.ring, *draft_cache_);
        });
    const auto position = [&](int32_t i) { return first + std::min(i, count - 1); }; // pads repeat the last
    for (int32_t i = 0; i < n; ++i) {
        i32_[(size_t) i] = (int32_t) (position(i) % state_.params.n_ring);
        i64_[(size_t) i] = i < count ? draft_cache_->slot(position(i)) : draft_cache_->pad_slot();
    }
    set_input(g.in.ring_rows, i32_.data());
    set_input(g.in.slots, i64_.data());
    for (int32_t i = 0; i < n; ++i) {
        i32_[(size_t) i] = (int32_t) position(i);
    }
    set_input(g.in.pos, i32_.data());
    compute_.run(g);
}

void Runner::fill_draft_mask(ggml_tensor * mask, bool sliding, int64_t n) {
    if (!mask) {
        return;
    }
    const ggml_fp16_t open = ggml_fp32_to_fp16(0.0f), closed = 0xfc00; // -infinity
    const int64_t n_kv = mask->ne[0], block = drafter_->block_size;
    for (int64_t slot = 0; slot < block; ++slot) {
        ggml_fp16_t * row = draft_mask_.data() + slot * n_kv;
        std::fill(row, row + n_kv, closed);
        for (int64_t t = 0; t < block; ++t) {
            row[t] = drafter_->sees(sliding, n + slot, n + t, true) ? open : closed;
        }
        for (int64_t p = std::max<int64_t>(0, n - draft_cache_->n_ring); p < n; ++p) {
            row[draft_cache_->slot(p)] = drafter_->sees(sliding, n + slot, p, false) ? open : closed;
        }
    }
    set_input(mask, draft_mask_.data());
}

const float * Runner::draft(int32_t pending, int64_t n, int32_t n_depth) {
    const int64_t block = drafter_->block_size;
    const int64_t n_kv =
        std::min(round_up(block + std::min(n, draft_cache_->n_ring), kv_granule), draft_cache_->n_slots);
    DraftGraph & g =
        compute_.graph<DraftGraph>({kind_draft, n_kv, n_depth, 0}, [&](const GraphBuilder & b, DraftGraph & graph) {
            graph.in.embd = b.input(GGML_TYPE_F32, target_.n_embd, block);
            graph.in.pos = b.input(GGML_TYPE_I32, block);
            graph.in.mask_full = drafter_->any_full ? b.input(GGML_TYPE_F16, n_kv, block) : nullptr;
            graph.in.mask_sliding = drafter_->any_sliding ? b.input(GGML_TYPE_F16, n_kv, block) : nullptr;
            graph.logits = drafter_->build_draft(b, graph.in, n_kv, n_depth, *draft_cache_);
        });
    drafter_->embed_block(pending, embd_.data());
    set_input(g.in.embd, embd_.data());
    std::iota(i32_.begin(), i32_.begin() + block, (int32_t) n);
    set_input(g.in.pos, i32_.data());
    fill_draft_mask(g.in.mask_full, false, n);
    fill_draft_mask(g.in.mask_sliding, true, n);
    compute_.run(g);
    return host_data(g.logits);
}

} // namespace pf
