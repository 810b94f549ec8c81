// The tree of candidates: what is verified in one target pass.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pydflash.h"

namespace pf {

constexpr int32_t max_ranks = 64; // choices per depth that build_tree looks at

struct Tree {
    int32_t n_nodes = 0; // the root included
    int32_t token[PF_MAX_NODES];
    int32_t parent[PF_MAX_NODES]; // < own index; -1 for the root
    int32_t depth[PF_MAX_NODES];  // 0 for the root
    int32_t rank[PF_MAX_NODES];   // among the drafter's choices at that depth; 0 for the root
    float score[PF_MAX_NODES];    // cumulative calibrated log-probability
};

// The column of a calibration table that a rank-0 probability falls in: n_bins equal bins over [0, 1], 1 in the last.
inline int32_t calibration_bin(double probability, int32_t n_bins) {
    return std::clamp(static_cast<int32_t>(probability * n_bins), 0, n_bins - 1);
}

// See pf_tree_build. Allocates nothing; the same input gives the same tree. ids in a row are taken to be distinct.
void build_tree(const int32_t * ids, const float * logp, int32_t n_depth, int32_t n_rank, int32_t budget, int32_t shape,
                const pf_calibration * calibration, int32_t root_token, Tree & out);

} // namespace pf
