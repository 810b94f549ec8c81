// What may be said, as the caller's three functions tell it: which tokens come next after a path, whether a path may be
// said at all, which tokens must come now. Paths begin behind the pending token. Owns the work memory, knows no grammar.
#pragma once

#include <cstdint>
#include <vector>

#include "pydflash.h"
#include "tree.h"

namespace pf {

class Constraint {
  public:
    Constraint(const pf_constraint & given, int32_t n_vocab); // throws Error on one that is incomplete
    // These throw where the caller's function fails.
    void mask(const int32_t * path, int32_t n, float * logits); // what may not come next becomes -inf
    bool allowed(const int32_t * path, int32_t n) const;
    // At most n_most tokens that are certain, until the next call; null where there is a choice.
    const Line * forced(int32_t n_most);

  private:
    pf_constraint given_;
    int32_t n_vocab_;
    std::vector<uint32_t> bits_; // of one mask
    Line line_;
};

} // namespace pf
