// The tree ops of this fork: recurrent layers evaluated over a tree of tokens, and what keeps a decode step on the device:
// its attention masks and the few likeliest tokens of a row.
//
// Owns: the builders of seven graph ops and the meaning of their operands, and the sealing of graphs. Refuses
// (GGML_ASSERT in the builder): wrong types or shapes, rows whose elements are not contiguous, head sizes that are not a
// multiple of 16.
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
// Any tree of any N. The state is only read.
GGML_API struct ggml_tensor * ggml_ssm_conv_tree(struct ggml_context * ctx, struct ggml_tensor * state,
                                                 struct ggml_tensor * x, struct ggml_tensor * kernel,
                                                 struct ggml_tensor * parent);

// Advances the state in place along an accepted path: it becomes the last K-1 of (its columns, those of the path).
//
//   state  [channels, K-1]  any row stride; updated
//   x      [channels, N]    as given to ggml_ssm_conv_tree
//   path   [P]              i32, root first; entries outside 0 .. N-1 are skipped, so -1 pads it; P and N have no limit
//   result a view of state: expand the graph with it
GGML_API struct ggml_tensor * ggml_ssm_conv_tree_persist(struct ggml_context * ctx, struct ggml_tensor * state,
                                                         struct ggml_tensor * x, struct ggml_tensor * path);

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

// The largest k of ggml_top_k_logp.
#define GGML_TOP_K_MAX 64

// Attention mask of a pass over a tree of N nodes behind n committed tokens, whose cache rows are n .. n + N - 1. Row i:
// columns [0, n) are open, column n + j is open iff j == i or j is an ancestor of i, everything else is closed.
//
//   parent      [N]         i32
//   n_committed [1]         i32, n; read when the graph runs, and taken as the nearest number of 0 .. n_kv
//   result      [n_kv, N]   f16, contiguous: 0 where open, -inf where closed; columns from n_kv on are left out
GGML_API struct ggml_tensor * ggml_tree_mask(struct ggml_context * ctx, struct ggml_tensor * parent,
                                             struct ggml_tensor * n_committed, int64_t n_kv);

// Attention mask of a block of tokens drafted behind n committed ones, over a cache that holds the block's own keys in
// columns [0, block) and those of the last n_ring committed positions in a ring behind: column block + r belongs to
// the largest position p < n with p % n_ring == r. Row s stands at position n + s.
//
//   column c < block      open iff (!causal || c <= s) and (window == 0 || (s - c < window && (causal || c - s < window)))
//   column of position p  open iff p >= 0 and (window == 0 || n + s - p < window)
//   columns behind        closed
//
//   n_committed [1]            i32, n; read when the graph runs, below 0 it is taken as 0
//   result      [n_kv, block]  f16, contiguous: 0 where open, -inf where closed; n_kv >= block
//
// window is 0 (none) or a number of positions; n_ring, window and block are below 2^31.
GGML_API struct ggml_tensor * ggml_block_mask(struct ggml_context * ctx, struct ggml_tensor * n_committed, int64_t n_kv,
                                              int64_t block, int64_t n_ring, int64_t window, bool causal);

// The k likeliest tokens of each row, likeliest first, ties by the lowest id, with their log-probabilities: log-softmax
// over the whole row.
//
//   logits [n_vocab, N]  contiguous; 1 <= k <= min(n_vocab, GGML_TOP_K_MAX), n_vocab < 2^31
//   result [2 k, N]      i32: k ids, then the bits of k f32 log-probabilities
//
// -inf is a masked token, and one among the k has log-probability -inf; any other has a finite one. A row with NaN, with
// +inf, or with nothing finite gives all ids -1 and all log-probabilities -inf.
GGML_API struct ggml_tensor * ggml_top_k_logp(struct ggml_context * ctx, struct ggml_tensor * logits, int k);

// Says that a graph is as it will always be: nodes, operands, and where they lie. A backend that records what it runs
// (CUDA) else compares every node with its record at every run, some megabytes of them.
GGML_API void ggml_graph_seal(struct ggml_cgraph * graph);

#ifdef __cplusplus
}
#endif
