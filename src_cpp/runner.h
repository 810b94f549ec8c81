// The four things a session has a backend do: evaluate nodes, commit a path, give the drafter its context, draft a block.
// Owns the caches and the graphs, and knows how each graph's inputs are filled. It does not know in which order they are
// wanted or how many tokens stand: every call is told the number of committed tokens.
//
// What travels in a step are embeddings and indices to the backend, and back what `pass` leaves for `read` and `draft`
// gives. Graphs have one shape per (node count, KV bucket) and are built once; all memory is there from the start, unless
// a run asks for a larger tree than the session was opened for.
#pragma once

#include <vector>

#include "plan.h"
#include "step_graphs.h"

namespace pf {

// Nodes of one pass, as arrays of n: a tree, or a chain that is a piece of a prompt. Pads have parent -1 and depth 0.
struct Nodes {
    int32_t n = 0; // with pads
    int32_t n_real = 0;
    std::vector<int32_t> token, parent, depth;

    void set(int32_t i, int32_t token_id, int32_t parent_node, int32_t node_depth) {
        token[(size_t) i] = token_id;
        parent[(size_t) i] = parent_node;
        depth[(size_t) i] = node_depth;
    }
};

class Runner {
  public:
    // drafter may be null. params has been checked.
    Runner(const Target & target, const Drafter * drafter, const pf_session_params & params);

    int32_t max_nodes() const { return max_nodes_; } // of any pass
    void clear();                                    // everything back to the empty timeline
    void reserve_tree(int32_t n_nodes);              // room for trees of so many nodes
    void drop_graphs() { compute_.drop_graphs(); }
    std::vector<Plan::Row> memory() const; // what is allocated
    const Caches & caches() const { return caches_; }
    const pf_counters & counters() const { return compute_.counters; }

    // Evaluates nodes behind n committed tokens. With options.commit the real nodes are a chain and become committed.
    // What comes back can be read until the next call.
    const PassOutputs & pass(const Nodes & nodes, int64_t n, const PassOptions & options);
    // Commits a path (root first) of the tree that the last pass over n_nodes nodes left behind.
    void commit(const int32_t * path, int32_t n_path, int32_t n_nodes, int64_t n);
    // Features of `count` nodes of the last pass, which now stand committed from position `first` on, become context of
    // the drafter; nodes may be null for the first `count`. They wait, and many become it at once, until the drafter is
    // asked, or there is no more room: where nothing is drafted that costs next to nothing.
    void append_context(const int32_t * nodes, int32_t count, int64_t first);
    void settle_context();                      // what waits becomes context now: before the caches are read
    void forget_context() { waiting_.clear(); } // before they are written
    // Drafts the block behind a pending token at position n: the n_rank likeliest tokens of each depth, likeliest first,
    // with their log-probabilities, each [n_depth, n_rank]; ids of -1 where a depth's logits are unusable.
    void draft(int32_t pending, int64_t n, int32_t n_depth, int32_t n_rank, int32_t * ids, float * logp);
    // The same block's logits, [n_depth, n_vocab].
    void draft_logits(int32_t pending, int64_t n, int32_t n_depth, float * out);
    // Rows [first, first + n) of an output of the last pass.
    void read(const ggml_tensor * t, int64_t first, int64_t n, void * out) { compute_.get(t, first, n, out); }

  private:
    template <class Shape>
    typename Shape::Graph & graph(const Shape & shape);
    int32_t * host(const ggml_tensor * index); // where the host has a graph's index tensor before it travels
    void fill_commit(const CommitInputs & in, int32_t n_nodes, const int32_t * path, int32_t n_path, int64_t n);
    DraftGraph & run_draft(int32_t pending, int64_t n, int32_t n_depth, int32_t n_rank);

    int32_t max_nodes_;
    Compute compute_;
    Caches caches_;

    struct Feature {
        int32_t row; // of the features
        int64_t position;
    };
    std::vector<Feature> waiting_; // to become context, rows and positions rising
    int32_t first_feature_ = 0;    // row of the last pass's first node

    std::vector<float> embd_; // work memory, sized once
    std::vector<int32_t> indices_, path_, top_;
};

} // namespace pf
