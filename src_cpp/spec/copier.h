// Copying from the timeline: what followed when its last tokens were said before, as a line for the tree.
//
// How likely each token of the line is comes from experience: Beta counts by the length of the match and by what the
// drafter thinks of the token, which begin with a prior. They belong to the session and change its speed only: what is
// said is always the target's choice.
#pragma once

#include <cstdint>

#include "copy_index.h"
#include "tree.h"

namespace pf {

class Copier {
  public:
    explicit Copier(int64_t n_ctx) : index_(n_ctx) { clear(); }

    // The timeline's tokens, whenever it has grown to n, or goes back to n.
    void clear();
    void grow(const int32_t * tokens, int64_t n) { index_.grow(tokens, n); }
    void shrink(const int32_t * tokens, int64_t n) { index_.shrink(tokens, n); }
    // The timeline is now these, a copy of another's with all that was learned there.
    void copy(const Copier & from, const int32_t * tokens, int64_t n);

    // A line of at most n_most tokens behind the n of the timeline, to go with the block that was drafted (as build_tree
    // takes it); null when there is nothing to copy. It stays until the next call.
    const Line * propose(const int32_t * tokens, int64_t n, int32_t n_most, const int32_t * ids, const float * logp,
                         int32_t n_depth, int32_t n_rank);
    // How many tokens of the last proposal, from its first on, were said.
    int32_t n_right(const int32_t * said, int32_t n) const;
    // What was said behind those n tokens, the tokens of one step: the last proposal is learned from, and gone.
    void learn(const int32_t * said, int32_t n);
    // The last proposal was never tried.
    void forget() { line_.n = 0; }

  private:
    static constexpr int32_t n_lengths = 5;
    static constexpr int32_t n_opinions = 6;
    struct Count {
        float hits, trials;
    };

    CopyIndex index_;
    Count counts_[n_lengths * n_opinions];
    Line line_;                  // the last proposal; nothing once it was learned from
    int32_t cell_[PF_MAX_NODES]; // of counts_, for each of its tokens
};

} // namespace pf
