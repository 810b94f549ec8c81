// DDTree: best-first choice of the nodes to verify. Refuses log-probabilities and rates that are none, before any work.
//
// Nodes have a total order: score falling, then the tuple of ranks along the path, lexicographic, a prefix before what
// it begins ((0) < (0, 0) < (1)). A node's first child and its next sibling both come after it: neither scores higher,
// and both have the larger tuple. So the heap, which holds exactly the successors of what was taken, gives nodes in
// that order, the first `budget` of them are the likeliest prefix-closed set, and a larger budget only adds nodes.
#include "spec/tree.h"

#include <array>
#include <cmath>
#include <limits>

#include "error.h"

namespace pf {
namespace {

constexpr int32_t max_depth = PF_MAX_NODES - 1;

// ranks + 1 along the path, zeros behind: comparing arrays is then comparing tuples.
using Path = std::array<uint8_t, max_depth>;

struct Candidate {
    double score;       // cumulative log-probability: the parent's plus its own
    double conditional; // its own, the parent taken as accepted
    double parent_score;
    int32_t parent; // in the order of taking; 0 is the root
    int32_t depth;  // 1 ..
    int32_t rank;
    int32_t deviations; // nodes of rank > 0 on the path to the parent
    Path path;
};

// What the drafter says of one depth.
struct Row {
    const float * logp; // [n_rank]
    double p0;          // of rank 0
    double log_rest;    // log of the probability of everything else; -inf when nothing is left
};

void check(const int32_t * ids, const float * logp, int32_t n_depth, int32_t n_rank, int32_t budget, int32_t shape,
           const pf_calibration * calibration) {
    require(budget >= 0 && budget < PF_MAX_NODES, "budget must be 0 to 63 nodes");
    require(shape == PF_SHAPE_TREE || shape == PF_SHAPE_CHAIN, "shape must be PF_SHAPE_TREE or PF_SHAPE_CHAIN");
    require(n_depth >= 0 && n_depth <= max_depth, "n_depth must be 0 to 63");
    if (n_depth > 0) {
        require(n_rank >= 1 && n_rank <= max_ranks, "n_rank must be 1 to 64");
        require(ids && logp, "ids and logp must be given where n_depth is not 0");
    }
    for (int32_t d = 0; d < n_depth; ++d) {
        const float * row = logp + static_cast<size_t>(d) * n_rank;
        for (int32_t r = 0; r < n_rank; ++r) {
            // A log-softmax rounds to a hair above 0 now and then; anything more is not a log-probability.
            if (!(row[r] >= -std::numeric_limits<float>::max() && row[r] <= 1e-3f)) {
                throw Error(PF_ERR_ARGUMENT, "logp[" + std::to_string(d) + "][" + std::to_string(r) +
                                                 "] is not a finite log-probability");
            }
            if (r > 0 && row[r] > row[r - 1]) {
                throw Error(PF_ERR_ARGUMENT, "logp[" + std::to_string(d) + "] rises at rank " + std::to_string(r) +
                                                 "; sort each depth's tokens, likeliest first");
            }
        }
    }
    if (calibration) {
        require(calibration->n_deviations >= 1 && calibration->n_deviations <= PF_MAX_NODES,
                "a calibration table must have 1 to 64 rows (n_deviations)");
        require(calibration->n_bins >= 1 && calibration->n_bins <= 1024,
                "a calibration table must have 1 to 1024 bins (n_bins)");
        require(calibration->rate, "a calibration table needs its rates");
        for (int32_t i = 0; i < calibration->n_deviations * calibration->n_bins; ++i) {
            if (!(calibration->rate[i] >= 0 && calibration->rate[i] <= 1)) {
                throw Error(PF_ERR_ARGUMENT, "calibration rate[" + std::to_string(i / calibration->n_bins) + "][" +
                                                 std::to_string(i % calibration->n_bins) + "] is not within 0 to 1");
            }
        }
    }
}

// Log-probability that the token of this rank is the target's, its parent accepted after so many deviations.
double conditional(const Row & row, int32_t rank, int32_t deviations, const pf_calibration * calibration) {
    const double logp = std::min(0.0, static_cast<double>(row.logp[rank]));
    if (!calibration) {
        return logp;
    }
    const int32_t line = std::min(deviations, calibration->n_deviations - 1);
    const int32_t bin = calibration_bin(row.p0, calibration->n_bins);
    const double rate = calibration->rate[static_cast<size_t>(line) * calibration->n_bins + bin];
    if (rank == 0) {
        return std::log(rate);
    }
    if (std::isinf(row.log_rest)) {
        return row.log_rest;
    }
    return std::log1p(-rate) + std::min(0.0, logp - row.log_rest);
}

// Numbers the nodes taken: the root, the rank-0 path (which is taken from the top down), the rest as taken.
void number(const Candidate * pool, const uint8_t * taken, int32_t n_nodes, const int32_t * ids, int32_t n_rank,
            int32_t root_token, Tree & out) {
    int32_t numbers[PF_MAX_NODES] = {}; // in the order of taking
    out.token[0] = root_token;
    out.parent[0] = -1;
    out.depth[0] = 0;
    out.rank[0] = 0;
    out.score[0] = 0;
    out.n_nodes = 1;
    for (const bool off_path : {false, true}) {
        for (int32_t i = 1; i < n_nodes; ++i) {
            const Candidate & node = pool[taken[i]];
            if ((node.deviations > 0 || node.rank > 0) != off_path) {
                continue;
            }
            const int32_t n = numbers[i] = out.n_nodes++;
            out.token[n] = ids[static_cast<size_t>(node.depth - 1) * n_rank + node.rank];
            out.parent[n] = numbers[node.parent];
            out.depth[n] = node.depth;
            out.rank[n] = node.rank;
            out.score[n] = static_cast<float>(node.score);
        }
    }
}

} // namespace

void build_tree(const int32_t * ids, const float * logp, int32_t n_depth, int32_t n_rank, int32_t budget, int32_t shape,
                const pf_calibration * calibration, int32_t root_token, Tree & out) {
    check(ids, logp, n_depth, n_rank, budget, shape, calibration);

    Row rows[max_depth];
    for (int32_t d = 0; d < n_depth; ++d) {
        Row & row = rows[d];
        row.logp = logp + static_cast<size_t>(d) * n_rank;
        if (calibration) {
            const double logp0 = std::min(0.0, static_cast<double>(row.logp[0]));
            row.p0 = std::exp(logp0);
            // 1 - p0 loses its digits near 1, where it can even fall below what the other ranks say they have.
            double others = 0;
            for (int32_t r = 1; r < n_rank; ++r) {
                others += std::exp(static_cast<double>(row.logp[r]));
            }
            row.log_rest = std::log(std::max(-std::expm1(logp0), others));
        }
    }

    // Each node taken adds at most two candidates and removes one.
    Candidate pool[2 * PF_MAX_NODES];
    uint8_t heap[2 * PF_MAX_NODES];
    int32_t n_pool = 0;
    int32_t n_heap = 0;
    const auto later = [&](uint8_t a, uint8_t b) {
        return pool[a].score != pool[b].score ? pool[a].score < pool[b].score : pool[a].path > pool[b].path;
    };
    // Completes a candidate that knows its parent, depth, rank, deviations and path.
    const auto push = [&](Candidate candidate, double at_most) {
        const Row & row = rows[candidate.depth - 1];
        candidate.conditional = std::min(at_most, conditional(row, candidate.rank, candidate.deviations, calibration));
        candidate.score = candidate.parent_score + candidate.conditional;
        candidate.path[candidate.depth - 1] = static_cast<uint8_t>(candidate.rank + 1);
        pool[n_pool] = candidate;
        heap[n_heap++] = static_cast<uint8_t>(n_pool++);
        std::push_heap(heap, heap + n_heap, later);
    };

    uint8_t taken[PF_MAX_NODES]; // [n_nodes], candidates; the root has none
    int32_t n_nodes = 1;
    if (n_depth > 0) {
        Candidate first{};
        first.depth = 1;
        push(first, 0);
    }
    while (n_nodes <= budget && n_heap > 0) {
        std::pop_heap(heap, heap + n_heap, later);
        taken[n_nodes] = heap[--n_heap];
        const Candidate & node = pool[taken[n_nodes]];
        if (shape == PF_SHAPE_TREE && node.rank + 1 < n_rank) {
            Candidate sibling = node;
            ++sibling.rank;
            // A table can think less of rank 0 than of the ranks behind it, but nothing may score higher than the
            // sibling before it, or the heap would find it too late.
            push(sibling, node.conditional);
        }
        if (node.depth < n_depth) {
            Candidate child{};
            child.parent_score = node.score;
            child.parent = n_nodes;
            child.depth = node.depth + 1;
            child.deviations = node.deviations + (node.rank > 0);
            child.path = node.path;
            push(child, 0);
        }
        ++n_nodes;
    }
    number(pool, taken, n_nodes, ids, n_rank, root_token, out);
}

} // namespace pf
