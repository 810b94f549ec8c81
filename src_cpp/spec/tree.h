// The tree of candidates: what is verified in one target pass.
#pragma once

#include <cstdint>

#include "pydflash.h"

namespace pf {

struct Tree {
    int32_t n_nodes = 0;            // the root included
    int32_t token[PF_MAX_NODES];
    int32_t parent[PF_MAX_NODES];   // < own index; -1 for the root
    int32_t depth[PF_MAX_NODES];    // 0 for the root
    int32_t rank[PF_MAX_NODES];     // among the drafter's choices at that depth; 0 for the root
    float score[PF_MAX_NODES];      // cumulative calibrated log-probability
};

// See pf_tree_build. Allocates nothing; deterministic.
void build_tree(const int32_t * ids, const float * logp, int32_t n_depth, int32_t n_rank, int32_t budget, int32_t shape,
                const pf_calibration * calibration, int32_t root_token, Tree & out);

} // namespace pf
