// Copying from the timeline: what followed when its last tokens were said before, as a line for the tree.
//
// How likely each token of the line is comes from experience: Beta counts by the length of the match and by what the
// drafter thinks of the token, which begin with a prior.
#pragma once

#include <cstdint>

#include "copy_index.h"
#include "tree.h"

namespace pf {

class CopyRates {
  public:
    CopyRates();

    // The cell of a token that is drafted for depth d (from 0) of a block as build_tree takes it, at the end of a match.
    static int32_t cell(int32_t match, int32_t token, int32_t d, const int32_t * ids, const float * logp,
                        int32_t n_depth, int32_t n_rank);
    float logp(int32_t cell) const;
    void see(int32_t cell, bool right);

    static constexpr int32_t n_lengths = 5;
    static constexpr int32_t n_opinions = 6;
    static constexpr int32_t n_values = 2 * n_lengths * n_opinions;
    void save(double * out) const;
    bool load(const double * values); // false, and nothing has changed: they are no rates

  private:
    struct Count {
        float hits, trials;
    };
    Count counts_[n_lengths * n_opinions];
};

class Copier {
  public:
    explicit Copier(int64_t n_ctx) : index_(n_ctx) {}

    // The timeline's tokens, whenever it has grown to n, or goes back to n.
    void clear();
    void grow(const int32_t * tokens, int64_t n) { index_.grow(tokens, n); }
    void shrink(const int32_t * tokens, int64_t n) { index_.shrink(tokens, n); }

    // A line of at most n_most tokens behind the n of the timeline, to go with the block that was drafted (as build_tree
    // takes it); null when there is nothing to copy. It stays until the next call.
    const Line * propose(const CopyRates & rates, const int32_t * tokens, int64_t n, int32_t n_most,
                         const int32_t * ids, const float * logp, int32_t n_depth, int32_t n_rank);
    // How many tokens of the last proposal, from its first on, were said.
    int32_t n_right(const int32_t * said, int32_t n) const;
    // What was said behind those n tokens, the tokens of one step: the last proposal is learned from, and gone.
    void learn(const int32_t * said, int32_t n, CopyRates & rates);
    // The last proposal was never tried.
    void forget() { line_.n = 0; }

  private:
    CopyIndex index_;
    Line line_;                  // the last proposal; nothing once it was learned from
    int32_t cell_[PF_MAX_NODES]; // of the rates, for each of its tokens
};

} // namespace pf
