// The tree of candidates: what is verified in one target pass.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#include "calibration.h"
#include "pydflash.h"

namespace pf {

constexpr int32_t max_ranks = 64; // choices per depth that build_tree looks at

struct Tree {
    int32_t n_nodes = 0; // the root included
    int32_t token[PF_MAX_NODES];
    int32_t parent[PF_MAX_NODES]; // < own index; -1 for the root
    int32_t depth[PF_MAX_NODES];  // 0 for the root
    int32_t rank[PF_MAX_NODES];   // among the drafter's choices at that depth, -1 for the line's own; 0 for the root
    float score[PF_MAX_NODES];    // cumulative calibrated log-probability
    int32_t taken[PF_MAX_NODES];  // place in the order of taking, likeliest first; 0 for the root
};

// One line of tokens below the root, proposed besides the drafter's block, and often longer than that.
struct Line {
    int32_t n = 0; // at most PF_MAX_NODES - 1
    int32_t token[PF_MAX_NODES];
    float logp[PF_MAX_NODES]; // of each token, those before it taken as accepted; 0: it is certain
};

// May path[0, n), the tokens below the root down to a candidate, be said? All but the last of them were allowed.
using Allowed = std::function<bool(const int32_t * path, int32_t n)>;

// Of a token among the n_rank choices of a depth; -1: it is none of them.
inline int32_t rank_of(int32_t token, const int32_t * ids, int32_t n_rank) {
    const int32_t * found = std::find(ids, ids + n_rank, token);
    return found == ids + n_rank ? -1 : static_cast<int32_t>(found - ids);
}

// See pf_tree_build. Allocates nothing; the same input gives the same tree. ids in a row are taken to be distinct.
// calibration and line may be null; an empty `allowed` allows everything.
void build_tree(const int32_t * ids, const float * logp, int32_t n_depth, int32_t n_rank, int32_t budget, int32_t shape,
                const Calibration * calibration, int32_t root_token, const Line * line, const Allowed & allowed,
                Tree & out);

// Leaves the n_nodes likeliest: what build_tree gives for as many.
void cut_tree(int32_t n_nodes, Tree & tree);

} // namespace pf
