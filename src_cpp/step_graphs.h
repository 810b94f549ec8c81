// What a session keeps where it computes, and the graphs of a step over it, by shape: the same builders serve the runner,
// which runs graphs, and the memory plan, which measures them.
//
// Knows which tensors each graph reads and writes; fills no input and allocates no compute buffer.
#pragma once

#include <algorithm>
#include <memory>

#include "cache/state.h"
#include "compute.h"
#include "model/drafter.h"
#include "model/target.h"
#include "pydflash.h"

namespace pf {

// Node counts that graphs are built for: powers of two up to 64, then multiples of 64.
int32_t node_bucket(int32_t n);

// Nodes in the largest graph of a pair; drafter may be null.
size_t max_graph_nodes(const Target & target, const Drafter * drafter);

// The caches of one session.
struct Caches {
    // drafter may be null; params has been checked. Room for trees of params.budget nodes and a root.
    Caches(const Target & target, const Drafter * drafter, const pf_session_params & params, const Memory & memory);

    const Target & target;
    const Drafter * drafter;
    State state;
    std::unique_ptr<DraftCache> draft; // null without a drafter
};

// One graph for each shape. Every graph has its index tensors as views of one input, `indices`, so that they travel as one.

struct PassGraph : Graph {
    using Graph::Graph;
    ggml_tensor * indices = nullptr;
    ggml_tensor * n_committed = nullptr; // [1] i32
    PassInputs in;
    CommitInputs commit;
    PassOutputs out;
};
struct PassShape {
    using Graph = PassGraph;
    int64_t n_nodes, n_kv;
    PassOptions options;

    GraphKey key() const;
};

struct CommitGraph : Graph {
    using Graph::Graph;
    ggml_tensor * indices = nullptr;
    CommitInputs in;
};
struct CommitShape {
    using Graph = CommitGraph;
    int64_t n_nodes;
    bool move_rows;

    GraphKey key() const;
};

struct AppendGraph : Graph {
    using Graph::Graph;
    ggml_tensor * indices = nullptr;
    AppendInputs in;
};
struct AppendShape {
    using Graph = AppendGraph;
    int64_t n;

    GraphKey key() const;
};

struct DraftGraph : Graph {
    using Graph::Graph;
    ggml_tensor * indices = nullptr;
    DraftInputs in;
    ggml_tensor * logits = nullptr; // [n_vocab, n_depth], an output where n_rank is 0
    ggml_tensor * top = nullptr;    // [2 n_rank, n_depth] i32: ids, then the bits of log-probabilities
};
struct DraftShape {
    using Graph = DraftGraph;
    int64_t n_kv, n_depth;
    int64_t n_rank; // choices a depth; 0: the logits themselves

    GraphKey key() const;
};

void build(const Caches & caches, const PassShape & shape, PassGraph & graph);
void build(const Caches & caches, const CommitShape & shape, CommitGraph & graph);
void build(const Caches & caches, const AppendShape & shape, AppendGraph & graph);
void build(const Caches & caches, const DraftShape & shape, DraftGraph & graph);

// Calls visit(shape) for the largest graph of each kind that prefill and decoding with at most params.budget nodes need.
template <class Visit>
void for_each_largest_graph(const Caches & caches, const pf_session_params & params, Visit && visit) {
    PassOptions options;
    options.taps = caches.drafter ? &caches.drafter->taps : nullptr;
    options.commit = true;
    const int64_t n_prefill = node_bucket(std::min(params.n_batch, params.n_ctx));
    visit(PassShape{n_prefill, caches.state.n_rows, options});
    options.commit = false;
    const int32_t budget = caches.drafter ? params.budget : 0;
    for (const PassHead head : {PassHead::choice, PassHead::logits}) {
        options.head = head;
        visit(PassShape{budget + 1, caches.state.n_rows, options});
    }
    visit(CommitShape{budget + 1, true});
    if (caches.drafter) {
        visit(AppendShape{n_prefill});
        const int64_t n_depth = std::min(caches.drafter->block_size - 1, budget);
        if (n_depth > 0) {
            visit(DraftShape{caches.draft->n_slots, n_depth, std::min(budget, caches.target.n_vocab)});
        }
    }
}

} // namespace pf
