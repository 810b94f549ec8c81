// The four things a session has a backend do: evaluate nodes, commit a path, give the drafter its context, draft a block.
// Owns the caches and the graphs, and knows how each graph's inputs are filled. It does not know in which order they are
// wanted or how many tokens stand: every call is told the number of committed tokens.
//
// Graphs have one shape per (node count, KV bucket) and are built once; a run allocates nothing.
#pragma once

#include <memory>
#include <vector>

#include "cache/mask.h"
#include "cache/state.h"
#include "compute.h"
#include "model/drafter.h"
#include "model/target.h"
#include "pydflash.h"

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

// Node counts that graphs are built for: powers of two up to 64, then multiples of 64.
int32_t node_bucket(int32_t n);

class Runner {
  public:
    // drafter may be null. params has been checked.
    Runner(const Target & target, const Drafter * drafter, const pf_session_params & params);
    ~Runner();

    int32_t max_nodes() const { return max_nodes_; } // of any pass
    void clear();                                    // everything back to the empty timeline
    void reserve_tree(int32_t n_nodes);              // room for trees of so many nodes
    void drop_graphs() { compute_.drop_graphs(); }

    // Evaluates nodes behind n committed tokens. With options.commit the real nodes are a chain and become committed.
    // What comes back is valid until the next call.
    const PassOutputs & pass(const Nodes & nodes, int64_t n, const PassOptions & options);
    // Commits a path (root first) of the tree that the last pass over n_nodes nodes left behind.
    void commit(const int32_t * path, int32_t n_path, int32_t n_nodes, int64_t n);
    // Features of `count` committed positions from `first` on become context of the drafter.
    void append_context(int64_t first, int32_t count);
    // Drafts the block behind a pending token at position n: logits [n_depth, n_vocab], valid until the next call.
    const float * draft(int32_t pending, int64_t n, int32_t n_depth);
    // An output where the host can read it. The CPU backend's memory is the host's.
    const float * host_data(const ggml_tensor * t) const { return ggml_get_data_f32(t); }

  private:
    struct PassGraph;
    struct CommitGraph;
    struct AppendGraph;
    struct DraftGraph;

    void fill_commit(const CommitInputs & in, int32_t n_nodes, const int32_t * path, int32_t n_path, int64_t n);
    void fill_draft_mask(ggml_tensor * mask, bool sliding, int64_t n);

    const Target & target_;
    const Drafter * drafter_;
    int32_t max_nodes_;
    Compute compute_;
    State state_;
    Mask mask_;
    std::unique_ptr<DraftCache> draft_cache_;

    std::vector<float> embd_; // work memory, sized once
    std::vector<int32_t> i32_, path_;
    std::vector<int64_t> i64_;
    std::vector<ggml_fp16_t> draft_mask_;
};

} // namespace pf
