// The tree ops of this fork: recurrent layers evaluated over a tree of tokens.
//
// Owns: the builders of three graph ops and the meaning of their operands. Refuses (GGML_ASSERT in the builder): wrong
// types or shapes, rows whose elements are not contiguous, head sizes that are not a multiple of 16.
//
// A tree is given by `parent`, i32 [N]: parent[i] < i is the node before node i, -1 is the committed state. A chain is
// parent[i] = i - 1. A pad is a node with parent -1 that nobody descends from: it yields finite values nobody reads and
// changes nothing else. Parents and paths are read when the graph runs; an entry that is neither -1 nor a smaller node
// number counts as -1. Shapes are in ne order (first dimension contiguous); everything is f32 unless said otherwise.
#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// ggml_gated_delta_net_tree takes any tree of up to this many nodes, and only chains beyond.
#define GGML_TREE_MAX_NODES 64

// The widest kernel that ggml_ssm_conv_tree takes.
#define GGML_TREE_MAX_TAPS 16

// Depthwise causal convolution along the tree: the K-1 taps before a node are its ancestors, nearest first, and above
// the root the committed columns, newest first.
//
//   state  [channels, K-1]  the last K-1 committed columns, oldest first; any row stride
//   x      [channels, N]    one raw column per node; any row stride
//   kernel [K, channels]    contiguous; tap K-1 multiplies the node itself
//   parent [N]              i32
//   result [channels, N]    contiguous; no activation
//
// Any tree of any N. The state is only read: committing it is keeping the last K-1 columns along the accepted path.
GGML_API struct ggml_tensor * ggml_ssm_conv_tree(struct ggml_context * ctx, struct ggml_tensor * state,
                                                 struct ggml_tensor * x, struct ggml_tensor * kernel,
                                                 struct ggml_tensor * parent);

// Gated delta rule along the tree. For value head h, key head h % Hk and node i with parent p (S_{-1} = state):
//
//   delta_i = beta_i (v_i - e^{g_i} S_p^T k_i)
//   S_i     = e^{g_i} S_p + k_i delta_i^T
//   out_i   = S_i^T q_i / sqrt(d)
//
//   q, k   [d,  Hk, N]      rows contiguous; head and node strides are free (slices of one [channels, N] matrix will do)
//   v      [dv, Hv, N]      likewise
//   g      [Hv, N]          log decay, <= 0 (-inf is fine); any row stride
//   beta   [Hv, N]          any row stride
//   state  [d, dv, Hv]      contiguous: S[head][value][key]; only read
//   parent [N]              i32
//   result 1-D, read it through the two views below
//
// No S_i is ever formed: with the decay D_ij = e^{g} multiplied along the path from j down to i, the deltas solve a
// triangular system whose right-hand side reads the state once (the WY form with an ancestor mask).
// N <= GGML_TREE_MAX_NODES: any tree. N > GGML_TREE_MAX_NODES: a chain, with pads at its end only; it is worked off in runs, and
// the state is carried from run to run in work memory.
GGML_API struct ggml_tensor * ggml_gated_delta_net_tree(struct ggml_context * ctx, struct ggml_tensor * q,
                                                        struct ggml_tensor * k, struct ggml_tensor * v,
                                                        struct ggml_tensor * g, struct ggml_tensor * beta,
                                                        struct ggml_tensor * state, struct ggml_tensor * parent);

// Views into the result r of ggml_gated_delta_net_tree: out_i and delta_i, each [dv, Hv, N], contiguous.
GGML_API struct ggml_tensor * ggml_gated_delta_net_tree_out(struct ggml_context * ctx, struct ggml_tensor * r);
GGML_API struct ggml_tensor * ggml_gated_delta_net_tree_delta(struct ggml_context * ctx, struct ggml_tensor * r);

// Advances the state in place along an accepted path j_1 .. j_l (each the parent of the next, the first a child of the
// committed state), from what the verified nodes left behind:
//
//   S <- w_0 S + sum_m w_m k_{j_m} delta_{j_m}^T,   w_m = e^{sum of g over j_{m+1} .. j_l}
//
//   state  [d, dv, Hv]      contiguous; updated
//   k      [d,  Hk, N]      as given to ggml_gated_delta_net_tree
//   delta  [dv, Hv, N]      from ggml_gated_delta_net_tree_delta; any head and node strides
//   g      [Hv, N]          as given to ggml_gated_delta_net_tree (the decay of each node, not its sum along the path)
//   path   [P]              i32, root first; entries outside 0 .. N-1 are skipped, so -1 pads it; P and N have no limit
//   result a view of state: expand the graph with it
GGML_API struct ggml_tensor * ggml_gated_delta_net_tree_persist(struct ggml_context * ctx, struct ggml_tensor * state,
                                                                struct ggml_tensor * k, struct ggml_tensor * delta,
                                                                struct ggml_tensor * g, struct ggml_tensor * path);

#ifdef __cplusplus
}
#endif
