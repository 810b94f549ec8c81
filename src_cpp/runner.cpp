#include "runner.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "ggml-tree.h"

namespace pf {

Runner::Runner(const Target & target, const Drafter * drafter, const pf_session_params & params)
    : max_nodes_(std::max(params.n_batch, PF_MAX_NODES)),
      compute_(target.device(), params.n_threads, max_graph_nodes(target, drafter)),
      caches_(target, drafter, params, {ggml_backend_get_default_buffer_type(compute_.backend())}),
      embd_((size_t) max_nodes_ * (size_t) target.n_embd) {
    for_each_largest_graph(caches_, params, [&](const auto & shape) {
        typename std::decay_t<decltype(shape)>::Graph graph(max_graph_nodes(target, drafter));
        build(caches_, shape, graph);
        compute_.reserve(graph);
        indices_.resize(std::max(indices_.size(), (size_t) ggml_nelements(graph.indices)));
    });
    compute_.counters = {}; // of what happens from here on
}

template <class Shape>
typename Shape::Graph & Runner::graph(const Shape & shape) {
    return compute_.graph<typename Shape::Graph>(shape.key(), [&](typename Shape::Graph & graph) {
        build(caches_, shape, graph);
        indices_.resize(std::max(indices_.size(), (size_t) ggml_nelements(graph.indices)));
    });
}

int32_t * Runner::host(const ggml_tensor * index) {
    return indices_.data() + index->view_offs / sizeof(int32_t);
}

std::vector<Plan::Row> Runner::memory() const {
    std::vector<Plan::Row> rows = cache_rows(caches_);
    rows.push_back({"compute buffer", PF_ROW_COUNTED, compute_.buffer_bytes()});
    rows.push_back({kept_graphs_row, PF_ROW_ASSUMED, compute_.graphs_bytes()});
    return rows;
}

void Runner::clear() {
    caches_.state.clear();
    forget_context();
}

void Runner::reserve_tree(int32_t n_nodes) {
    if (n_nodes > caches_.state.max_nodes) {
        compute_.drop_graphs(); // they point at the old scratch
        caches_.state.reserve_tree(n_nodes);
        ++compute_.counters.buffers;
    }
}

const PassOutputs & Runner::pass(const Nodes & nodes, int64_t n, const PassOptions & options) {
    const int64_t n_nodes = nodes.n;
    const int64_t n_kv = std::min(round_up(n + n_nodes, kv_granule), caches_.state.n_rows);
    if (options.taps) {
        // Behind what waits; a whole chunk does so no longer than until the next pass.
        first_feature_ = waiting_.empty() ? 0 : waiting_.back().row + 1;
        if (first_feature_ + n_nodes > caches_.state.params.n_features) {
            settle_context();
            first_feature_ = 0;
        }
    }
    PassGraph & g = graph(PassShape{n_nodes, n_kv, options});

    embed_rows(caches_.target.token_embd(), nodes.token.data(), n_nodes, embd_.data());
    compute_.set(g.in.embd, embd_.data());

    if (options.taps) {
        std::iota(host(g.in.feature_rows), host(g.in.feature_rows) + n_nodes, first_feature_);
    }
    *host(g.n_committed) = (int32_t) n;
    std::copy_n(nodes.parent.data(), n_nodes, host(g.in.parent));
    for (int32_t i = 0; i < n_nodes; ++i) {
        host(g.in.pos)[i] = (int32_t) n + nodes.depth[(size_t) i];
        host(g.in.kv_rows)[i] = (int32_t) n + i;
    }
    if (options.commit) {
        path_.resize((size_t) nodes.n_real);
        std::iota(path_.begin(), path_.end(), 0);
        fill_commit(g.commit, nodes.n, path_.data(), nodes.n_real, n);
    }
    compute_.set(g.indices, indices_.data());
    compute_.run(g);
    return g.out;
}

void Runner::commit(const int32_t * path, int32_t n_path, int32_t n_nodes, int64_t n) {
    // Trees are numbered rank-0 path first: as long as the path follows it, every row is where it belongs.
    CommitGraph & g = graph(CommitShape{n_nodes, path[n_path - 1] != n_path - 1});
    fill_commit(g.in, n_nodes, path, n_path, n);
    compute_.set(g.indices, indices_.data());
    compute_.run(g);
}

void Runner::fill_commit(const CommitInputs & in, int32_t n_nodes, const int32_t * path, int32_t n_path, int64_t n) {
    if (in.path) {
        for (int32_t i = 0; i < n_nodes; ++i) {
            host(in.path)[i] = i < n_path ? path[i] : -1;
        }
    }
    if (in.kv_from) {
        // Where nothing moves a row is copied onto itself: the root's, which always stays.
        for (int32_t i = 0; i < n_nodes; ++i) {
            host(in.kv_from)[i] = (int32_t) n + (i < n_path ? path[i] : 0);
            host(in.kv_to)[i] = (int32_t) n + (i < n_path ? i : 0);
        }
    }
}

// ---- the drafter -------------------------------------------------------------------------------------------------

void Runner::append_context(const int32_t * nodes, int32_t count, int64_t first) {
    for (int32_t i = 0; i < count; ++i) {
        waiting_.push_back({first_feature_ + (nodes ? nodes[i] : i), first + i});
    }
}

void Runner::settle_context() {
    const int32_t count = (int32_t) waiting_.size();
    if (count == 0) {
        return;
    }
    const int32_t n = node_bucket(count);
    AppendGraph & g = graph(AppendShape{n});
    for (int32_t i = 0; i < n; ++i) {
        const Feature & feature = waiting_[(size_t) std::min(i, count - 1)]; // pads repeat the last
        host(g.in.nodes)[i] = feature.row;
        host(g.in.pos)[i] = (int32_t) feature.position;
        host(g.in.slots)[i] = (int32_t) (i < count ? caches_.draft->slot(feature.position) : caches_.draft->pad_slot());
    }
    compute_.set(g.indices, indices_.data());
    compute_.run(g);
    waiting_.clear();
}

DraftGraph & Runner::run_draft(int32_t pending, int64_t n, int32_t n_depth, int32_t n_rank) {
    settle_context();
    const DraftCache & cache = *caches_.draft;
    const int64_t n_kv = std::min(round_up(cache.block_size + std::min(n, cache.n_ring), kv_granule), cache.n_slots);
    DraftGraph & g = graph(DraftShape{n_kv, n_depth, n_rank});
    caches_.drafter->embed(pending, embd_.data());
    compute_.set(g.in.embd, embd_.data());
    *host(g.in.n_committed) = (int32_t) n;
    std::iota(host(g.in.pos), host(g.in.pos) + cache.block_size, (int32_t) n);
    compute_.set(g.indices, indices_.data());
    compute_.run(g);
    return g;
}

void Runner::draft(int32_t pending, int64_t n, int32_t n_depth, int32_t n_rank, int32_t * ids, float * logp) {
    const DraftGraph & g = run_draft(pending, n, n_depth, n_rank);
    top_.resize((size_t) (2 * n_rank * n_depth));
    compute_.get(g.top, 0, n_depth, top_.data());
    for (int32_t d = 0; d < n_depth; ++d) {
        const int32_t * row = top_.data() + 2 * n_rank * d;
        std::copy_n(row, n_rank, ids + d * n_rank);
        std::memcpy(logp + d * n_rank, row + n_rank, (size_t) n_rank * sizeof(float));
    }
}

void Runner::draft_logits(int32_t pending, int64_t n, int32_t n_depth, float * out) {
    compute_.get(run_draft(pending, n, n_depth, 0).logits, 0, n_depth, out);
}

} // namespace pf
