// What a target remembers: KV cache, recurrent and convolution state, the scratch a verified tree leaves behind for its
// commit, and the features of a pass for the drafter. Owns the tensors; the committed length is the session's to know.
#pragma once

#include <cstdint>
#include <vector>

#include "graph.h"
#include "tensor_block.h"

namespace pf {

// How much of what a target must remember. Zero layers of a kind means none of it.
struct StateShape {
    int n_attn = 0; // attention layers
    int head_dim = 0;
    int n_head_kv = 0;
    int n_recurrent = 0; // Gated DeltaNet layers
    int d_key = 0;
    int d_value = 0;
    int n_key_heads = 0;
    int n_value_heads = 0;
    int conv_width = 0; // K
    int channels = 0;
    int n_embd = 0;
};

struct StateParams {
    int64_t n_ctx = 0;
    ggml_type type_k = GGML_TYPE_F16;
    ggml_type type_v = GGML_TYPE_F16;
    int n_taps = 0;         // 0: no drafter, no features
    int64_t n_features = 0; // nodes of the largest pass
    ggml_type type_features = GGML_TYPE_BF16;
};

// Index tensors of a commit, filled from an accepted path.
struct CommitInputs {
    ggml_tensor * path = nullptr;    // [N] i32, node indices root first, -1 pads
    ggml_tensor * kv_from = nullptr; // [N] i32 rows; null when nothing moves
    ggml_tensor * kv_to = nullptr;   // [N] i32
};

class State {
  public:
    State(const StateShape & shape, const StateParams & params, const Memory & memory);
    State(const State &) = delete;
    State & operator=(const State &) = delete;

    StateShape shape;
    StateParams params;
    int64_t n_rows = 0;    // cache rows: n_ctx and room for a tree, a multiple of 256
    bool rotate_k = false; // Hadamard-rotated before it is quantised
    bool rotate_v = false;

    std::vector<ggml_tensor *> k, v;    // [head_dim * n_head_kv, n_rows] an attention layer
    std::vector<ggml_tensor *> s;       // [d_key, d_value, n_value_heads] f32, a recurrent layer
    std::vector<ggml_tensor *> conv;    // [channels, K-1] f32, row 0 oldest
    ggml_tensor * features = nullptr;   // [n_taps * n_embd, n_features] rows as passes were told
    ggml_tensor * hadamard_k = nullptr; // [n, n] orthonormal
    ggml_tensor * hadamard_v = nullptr;

    // What a verified tree leaves behind until its path is committed, a recurrent layer each; all f32.
    int max_nodes = 0;
    std::vector<ggml_tensor *> tree_k;     // [d_key * n_key_heads, max_nodes]
    std::vector<ggml_tensor *> tree_delta; // [d_value * n_value_heads, max_nodes]
    std::vector<ggml_tensor *> tree_g;     // [n_value_heads, max_nodes]
    std::vector<ggml_tensor *> tree_x;     // [channels, max_nodes]

    // Makes room for trees of n nodes; what the scratch held is lost, the rest of the state is not.
    // Graphs that refer to the scratch must be dropped first. Throws PF_ERR_MEMORY and keeps the old scratch.
    void reserve_tree(int n_nodes);

    uint64_t kv_bytes() const { return kv_.n_bytes(); } // with the rotations
    uint64_t recurrent_bytes() const { return recurrent_.n_bytes(); }
    uint64_t feature_bytes() const { return features_.n_bytes(); }
    uint64_t tree_bytes() const { return scratch_.n_bytes(); }

    // Recurrent state back to the beginning; KV rows need no clearing, since no mask opens them.
    void clear();

    // Graph nodes. `x` is [channels, N] raw columns, k [d_key, n_key_heads, N], delta [d_value, n_value_heads, N], g [Hv, N].
    void save_tree(const GraphBuilder & b, int layer, ggml_tensor * x, ggml_tensor * k, ggml_tensor * delta,
                   ggml_tensor * g) const;
    void commit_recurrent(const GraphBuilder & b, int layer, ggml_tensor * x, ggml_tensor * k, ggml_tensor * delta,
                          ggml_tensor * g, const CommitInputs & in) const;
    // The whole commit of a saved tree of n_nodes.
    void commit_tree(const GraphBuilder & b, int n_nodes, const CommitInputs & in) const;

  private:
    Memory memory_;
    TensorBlock kv_, recurrent_, features_;
    TensorBlock scratch_;
};

// x [n, ...] with every run of `hadamard`'s size rotated; the rotation is its own inverse.
ggml_tensor * rotate(const GraphBuilder & b, ggml_tensor * hadamard, ggml_tensor * x);

} // namespace pf
