// DDTree: best-first choice of the nodes to verify. Refuses log-probabilities and rates that are none, before any work.
//
// The children a node can have, likeliest first: the drafter's choices at that depth by rank, and among them, in a node
// on the line's path, the line's next token; before those it ties with. Nodes have a total order: score falling, then
// the tuple of places among siblings along the path, lexicographic, a prefix before what it begins ((0) < (0, 0) < (1)).
// A node's first child and its next sibling both come after it: neither scores higher, and both have the larger tuple.
// So the heap, which holds exactly the successors of what was taken, gives nodes in that order, the first `budget` of
// them are the likeliest prefix-closed set, and a larger budget only adds nodes. A node that is not allowed leaves its
// place to its next sibling, and what would hang below it is never looked at: the order of the others stays.
#include "spec/tree.h"

#include <array>
#include <cmath>
#include <limits>

#include "error.h"

namespace pf {
namespace {

constexpr int32_t max_depth = PF_MAX_NODES - 1;
constexpr double nothing = -std::numeric_limits<double>::infinity();

// Places + 1 along the path, zeros behind: comparing arrays is then comparing tuples.
using Path = std::array<uint8_t, max_depth>;

struct Candidate {
    double score; // cumulative log-probability
    double parent_score;
    int32_t parent; // in the order of taking; 0 is the root
    int32_t depth;  // 1 ..
    int32_t token;
    int32_t rank;       // of the drafter's choices; -1: the line's own
    int32_t next_rank;  // of the siblings that follow
    int32_t deviations; // nodes of other ranks than 0 on the path to the parent
    bool below_line;    // the parent is on the line's path
    bool line_follows;  // the line's token is among the siblings that follow
    bool on_line;       // on the line's path
    Path path;
};

// What is known of the candidates of one depth.
struct Row {
    const float * logp; // [n_rank], the drafter's
    int32_t n_rank;     // 0 below the drafter's block
    int32_t line_rank;  // of the line's token; -1 when the drafter has not chosen it
};

void check(const int32_t * ids, const float * logp, int32_t n_depth, int32_t n_rank, int32_t budget, int32_t shape,
           const Calibration * calibration, const Line * line) {
    require(budget >= 0 && budget < PF_MAX_NODES, "budget must be 0 to 63 nodes");
    require(shape == PF_SHAPE_TREE || shape == PF_SHAPE_CHAIN, "shape must be PF_SHAPE_TREE or PF_SHAPE_CHAIN");
    require(n_depth >= 0 && n_depth <= max_depth, "n_depth must be 0 to 63");
    if (n_depth > 0) {
        require(n_rank >= 1 && n_rank <= max_ranks, "n_rank must be 1 to 64");
        require(ids && logp, "ids and logp must be given where n_depth is not 0");
    }
    // A log-softmax rounds to a hair above 0 now and then; anything more is not a log-probability.
    const auto is_logp = [](float x) { return x >= -std::numeric_limits<float>::max() && x <= 1e-3f; };
    for (int32_t d = 0; d < n_depth; ++d) {
        const float * row = logp + static_cast<size_t>(d) * n_rank;
        for (int32_t r = 0; r < n_rank; ++r) {
            if (!is_logp(row[r])) {
                throw Error(PF_ERR_ARGUMENT, "logp[" + std::to_string(d) + "][" + std::to_string(r) +
                                                 "] is not a finite log-probability");
            }
            if (r > 0 && row[r] > row[r - 1]) {
                throw Error(PF_ERR_ARGUMENT, "logp[" + std::to_string(d) + "] rises at rank " + std::to_string(r) +
                                                 "; sort each depth's tokens, likeliest first");
            }
        }
    }
    if (line) {
        for (int32_t d = 0; d < line->n; ++d) {
            if (!is_logp(line->logp[d])) {
                throw Error(PF_ERR_ARGUMENT, "line logp[" + std::to_string(d) + "] is not a finite log-probability");
            }
        }
    }
    if (calibration) {
        for (const double weight : calibration->weight) {
            require(std::abs(weight) <= 2e6, "a weight of the calibration is not within -2e6 to 2e6");
        }
    }
}

// Log-probability that the token of this rank is the target's, its parent accepted after so many deviations. No rank has
// more than the one before it.
double conditional(const Row & row, int32_t depth, int32_t rank, int32_t deviations, const Calibration * calibration) {
    if (!calibration) {
        return std::min(0.0, static_cast<double>(row.logp[rank]));
    }
    double least = 0;
    for (int32_t r = 0; r <= rank; ++r) {
        least = std::min(least, calibration->logp(depth, deviations, r, row.logp[r], row.logp[0]));
    }
    return least;
}

// The candidates of every depth, and the steps from one to its first child and to its next sibling.
class Candidates {
  public:
    Candidates(const int32_t * ids, const float * logp, int32_t n_depth, int32_t n_rank,
               const Calibration * calibration, const Line * line)
        : ids_(ids), n_rank_(n_rank), calibration_(calibration), line_(line) {
        const int32_t n_line = line ? line->n : 0;
        n_depth_ = std::max(n_depth, n_line);
        for (int32_t d = 0; d < n_depth_; ++d) {
            Row & row = rows_[d];
            row.n_rank = d < n_depth ? n_rank : 0;
            row.logp = row.n_rank > 0 ? logp + static_cast<size_t>(d) * n_rank : nullptr;
            row.line_rank = d < n_line && row.n_rank > 0
                                ? rank_of(line->token[d], ids + static_cast<size_t>(d) * n_rank, n_rank)
                                : -1;
        }
    }

    // parent: in the order of taking; null for the root's child. False when there is none.
    bool first_child(const Candidate * parent, int32_t taken_as, Candidate & out) const {
        out.depth = parent ? parent->depth + 1 : 1;
        if (out.depth > n_depth_) {
            return false;
        }
        out.parent = taken_as;
        out.parent_score = parent ? parent->score : 0;
        out.deviations = parent ? parent->deviations + (parent->rank != 0) : 0;
        out.below_line = out.line_follows = (parent ? parent->on_line : true) && line_ && out.depth <= line_->n;
        out.path = parent ? parent->path : Path{};
        out.next_rank = 0;
        return settle(out);
    }

    // Turns a candidate into its next sibling; false when there is none.
    bool next_sibling(Candidate & c) const { return settle(c); }

  private:
    int32_t id(int32_t d, int32_t rank) const { return ids_[static_cast<size_t>(d) * n_rank_ + rank]; }

    // Makes `c` the likeliest of the children not yet looked at.
    bool settle(Candidate & c) const {
        const int32_t d = c.depth - 1;
        const Row & row = rows_[d];
        double line_logp = nothing; // of the line's token, if it is a child here
        double left = 0;            // log of what it leaves to each of the others, of the probability they had
        if (c.below_line) {
            const double own =
                row.line_rank >= 0 ? conditional(row, c.depth, row.line_rank, c.deviations, calibration_) : nothing;
            line_logp = std::min(0.0, static_cast<double>(line_->logp[d]));
            if (line_logp > own) {
                left = log_without(line_logp) - log_without(own);
            } else {
                line_logp = own;
            }
            if (c.next_rank == row.line_rank) {
                ++c.next_rank;
            }
        }
        const bool more = c.next_rank < row.n_rank;
        double logp = more ? conditional(row, c.depth, c.next_rank, c.deviations, calibration_) + left : nothing;
        c.on_line = c.line_follows && (!more || line_logp >= logp);
        if (c.on_line) {
            c.line_follows = false;
            c.token = line_->token[d];
            c.rank = row.line_rank;
            logp = line_logp;
        } else if (more) {
            c.token = id(d, c.next_rank);
            c.rank = c.next_rank++;
        } else {
            return false;
        }
        c.score = c.parent_score + logp;
        ++c.path[d];
        return true;
    }

    // log(1 - exp(logp))
    static double log_without(double logp) { return logp < 0 ? std::log(-std::expm1(logp)) : nothing; }

    const int32_t * ids_; // [n_depth, n_rank]
    int32_t n_rank_;
    const Calibration * calibration_;
    const Line * line_;
    int32_t n_depth_;
    Row rows_[max_depth];
};

// Numbers the nodes taken: the root, the path of first siblings (which is taken from the top down), the rest as taken.
void number(const Candidate * pool, const uint8_t * taken, int32_t n_nodes, int32_t root_token, Tree & out) {
    int32_t numbers[PF_MAX_NODES] = {}; // in the order of taking
    out.token[0] = root_token;
    out.parent[0] = -1;
    out.depth[0] = 0;
    out.rank[0] = 0;
    out.score[0] = 0;
    out.taken[0] = 0;
    out.n_nodes = 1;
    for (const bool on_path : {true, false}) {
        int32_t end = 0; // of the path: its next node is the first that was taken below it
        for (int32_t i = 1; i < n_nodes; ++i) {
            const Candidate & node = pool[taken[i]];
            const bool extends = node.parent == end;
            end = extends ? i : end;
            if (extends != on_path) {
                continue;
            }
            const int32_t n = numbers[i] = out.n_nodes++;
            out.token[n] = node.token;
            out.parent[n] = numbers[node.parent];
            out.depth[n] = node.depth;
            out.rank[n] = node.rank;
            out.score[n] = static_cast<float>(node.score);
            out.taken[n] = i;
        }
    }
}

} // namespace

void build_tree(const int32_t * ids, const float * logp, int32_t n_depth, int32_t n_rank, int32_t budget, int32_t shape,
                const Calibration * calibration, int32_t root_token, const Line * line, const Allowed & allowed,
                Tree & out) {
    check(ids, logp, n_depth, n_rank, budget, shape, calibration, line);
    const Candidates candidates(ids, logp, n_depth, n_rank, calibration, line);

    // Each node taken adds at most two candidates and removes one; one that is not allowed makes room for its sibling.
    Candidate pool[2 * PF_MAX_NODES];
    uint8_t heap[2 * PF_MAX_NODES];
    int32_t n_pool = 0;
    int32_t n_heap = 0;
    const auto later = [&](uint8_t a, uint8_t b) {
        return pool[a].score != pool[b].score ? pool[a].score < pool[b].score : pool[a].path > pool[b].path;
    };
    const auto push = [&](uint8_t slot) {
        heap[n_heap++] = slot;
        std::push_heap(heap, heap + n_heap, later);
    };

    uint8_t taken[PF_MAX_NODES]; // [n_nodes], candidates; the root has none
    int32_t n_nodes = 1;
    const auto may_be_said = [&](const Candidate & node) {
        if (!allowed) {
            return true;
        }
        int32_t path[max_depth];
        path[node.depth - 1] = node.token;
        for (int32_t d = node.depth - 1, above = node.parent; d > 0; --d) {
            path[d - 1] = pool[taken[above]].token;
            above = pool[taken[above]].parent;
        }
        return allowed(path, node.depth);
    };
    if (candidates.first_child(nullptr, 0, pool[0])) {
        push(static_cast<uint8_t>(n_pool++));
    }
    while (n_nodes <= budget && n_heap > 0) {
        std::pop_heap(heap, heap + n_heap, later);
        const uint8_t slot = heap[--n_heap];
        if (!may_be_said(pool[slot])) {
            if (candidates.next_sibling(pool[slot])) {
                push(slot);
            }
            continue;
        }
        taken[n_nodes] = slot;
        if (shape == PF_SHAPE_TREE) {
            pool[n_pool] = pool[slot];
            if (candidates.next_sibling(pool[n_pool])) {
                push(static_cast<uint8_t>(n_pool++));
            }
        }
        if (candidates.first_child(&pool[slot], n_nodes, pool[n_pool])) {
            push(static_cast<uint8_t>(n_pool++));
        }
        ++n_nodes;
    }
    number(pool, taken, n_nodes, root_token, out);
}

void cut_tree(int32_t n_nodes, Tree & tree) {
    int32_t numbers[PF_MAX_NODES] = {};
    int32_t n = 0;
    for (int32_t i = 0; i < tree.n_nodes; ++i) {
        if (tree.taken[i] >= n_nodes) {
            continue;
        }
        tree.token[n] = tree.token[i];
        tree.parent[n] = i == 0 ? -1 : numbers[tree.parent[i]]; // taken before, and so kept
        tree.depth[n] = tree.depth[i];
        tree.rank[n] = tree.rank[i];
        tree.score[n] = tree.score[i];
        tree.taken[n] = tree.taken[i];
        numbers[i] = n++;
    }
    tree.n_nodes = n;
}

} // namespace pf
