#include "step_graphs.h"

#include "ggml-tree.h"

namespace pf {

namespace {

constexpr int32_t chunk_granule = 64;

enum Kind : int64_t { kind_pass, kind_commit, kind_append, kind_draft };

StateParams state_params(const Drafter * drafter, const pf_session_params & p) {
    StateParams s;
    s.n_ctx = p.n_ctx;
    s.type_k = (ggml_type) p.type_k;
    s.type_v = (ggml_type) p.type_v;
    if (drafter) {
        // With an f32 target cache drafting is f32 throughout, else half precision will do.
        s.n_taps = (int) drafter->taps.size();
        s.n_features = std::max(p.n_batch, PF_MAX_NODES);
        s.type_features = s.type_k == GGML_TYPE_F32 ? GGML_TYPE_F32 : GGML_TYPE_BF16;
    }
    return s;
}

// One i32 input, given out in views.
class IndexBlock {
  public:
    IndexBlock(const GraphBuilder & b, int64_t n) : b_(b), all_(b.input(GGML_TYPE_I32, n)) {}
    IndexBlock(const IndexBlock &) = delete;
    IndexBlock & operator=(const IndexBlock &) = delete;

    ggml_tensor * all() const { return all_; }
    ggml_tensor * take(int64_t n) {
        GGML_ASSERT(used_ + n <= all_->ne[0]);
        ggml_tensor * view = ggml_view_1d(b_.ctx, all_, n, (size_t) used_ * sizeof(int32_t));
        used_ += n;
        return view;
    }

  private:
    const GraphBuilder & b_;
    ggml_tensor * all_; // [n]
    int64_t used_ = 0;
};

int64_t n_commit_indices(const StateShape & s, int64_t n_nodes, bool move_rows) {
    return (s.n_recurrent > 0 ? n_nodes : 0) + (move_rows ? 2 * n_nodes : 0);
}

CommitInputs commit_inputs(IndexBlock & indices, const StateShape & s, int64_t n_nodes, bool move_rows) {
    CommitInputs in;
    if (s.n_recurrent > 0) {
        in.path = indices.take(n_nodes);
    }
    if (move_rows) {
        in.kv_from = indices.take(n_nodes);
        in.kv_to = indices.take(n_nodes);
    }
    return in;
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

// A qwen35 layer takes about 60 nodes with the saving of a tree, a drafter layer 35.
size_t max_graph_nodes(const Target & target, const Drafter * drafter) {
    return 512 + 96 * (size_t) std::max(target.n_layer, drafter ? drafter->n_layer : 0);
}

Caches::Caches(const Target & target_in, const Drafter * drafter_in, const pf_session_params & params,
               const Memory & memory)
    : target(target_in), drafter(drafter_in), state(target.state_shape, state_params(drafter, params), memory) {
    state.reserve_tree((drafter ? params.budget : 0) + 1);
    if (drafter) {
        const ggml_type type = state.params.type_k == GGML_TYPE_F32 ? GGML_TYPE_F32 : GGML_TYPE_F16;
        draft = std::make_unique<DraftCache>(*drafter, params.n_ring, type, memory);
    }
}

GraphKey PassShape::key() const {
    const int64_t flags = options.commit | (options.taps != nullptr) << 1 | (options.capture != nullptr) << 2 |
                          (int64_t) options.head << 3;
    return {kind_pass, n_nodes, n_kv, flags};
}

void build(const Caches & caches, const PassShape & shape, PassGraph & g) {
    const GraphBuilder b = g.builder();
    const PassOptions & options = shape.options;
    const StateShape & s = caches.target.state_shape;
    const int64_t n = shape.n_nodes;
    IndexBlock indices(b, (options.taps ? 4 : 3) * n + 1 + (options.commit ? n_commit_indices(s, n, false) : 0));
    g.indices = indices.all();
    g.n_committed = indices.take(1);
    g.in.embd = b.input(GGML_TYPE_F32, caches.target.n_embd, n);
    g.in.pos = indices.take(n);
    g.in.parent = indices.take(n);
    g.in.kv_rows = indices.take(n);
    if (options.taps) {
        g.in.feature_rows = indices.take(n);
    }
    g.in.mask = ggml_tree_mask(b.ctx, g.in.parent, g.n_committed, shape.n_kv);
    if (options.commit) {
        g.commit = commit_inputs(indices, s, n, false);
    }
    if (options.capture) {
        g.out.hidden.resize(options.capture->size());
    }
    caches.target.build_pass(b, g.in, g.commit, caches.state, options, g.out);
    if (options.head == PassHead::choice) {
        g.out.choice = b.output(ggml_top_k_logp(b.ctx, g.out.logits, 1));
    } else if (options.head == PassHead::logits) {
        b.output(g.out.logits);
    }
}

GraphKey CommitShape::key() const {
    return {kind_commit, n_nodes, move_rows, 0};
}

void build(const Caches & caches, const CommitShape & shape, CommitGraph & g) {
    const GraphBuilder b = g.builder();
    const StateShape & s = caches.target.state_shape;
    IndexBlock indices(b, std::max<int64_t>(1, n_commit_indices(s, shape.n_nodes, shape.move_rows)));
    g.indices = indices.all();
    g.in = commit_inputs(indices, s, shape.n_nodes, shape.move_rows);
    caches.state.commit_tree(b, (int) shape.n_nodes, g.in);
}

GraphKey AppendShape::key() const {
    return {kind_append, n, 0, 0};
}

void build(const Caches & caches, const AppendShape & shape, AppendGraph & g) {
    const GraphBuilder b = g.builder();
    IndexBlock indices(b, 3 * shape.n);
    g.indices = indices.all();
    g.in.nodes = indices.take(shape.n);
    g.in.pos = indices.take(shape.n);
    g.in.slots = indices.take(shape.n);
    caches.drafter->build_append(b, g.in, caches.state.features, *caches.draft);
}

GraphKey DraftShape::key() const {
    return {kind_draft, n_kv, n_depth, n_rank};
}

void build(const Caches & caches, const DraftShape & shape, DraftGraph & g) {
    const GraphBuilder b = g.builder();
    const int64_t block = caches.drafter->block_size;
    IndexBlock indices(b, block + 1);
    g.indices = indices.all();
    g.in.embd = b.input(GGML_TYPE_F32, caches.target.n_embd);
    g.in.n_committed = indices.take(1);
    g.in.pos = indices.take(block);
    g.logits = caches.drafter->build_draft(b, g.in, shape.n_kv, (int32_t) shape.n_depth, *caches.draft);
    if (shape.n_rank > 0) {
        g.top = b.output(ggml_top_k_logp(b.ctx, g.logits, (int) shape.n_rank));
    } else {
        b.output(g.logits);
    }
}

} // namespace pf
