// The target's choice of one token from one row of logits: argmax, or the one draw that (seed, position) stand for, so
// that a position draws the same token however it is reached.
#pragma once

#include <cstdint>
#include <vector>

#include "pydflash.h"

namespace pf {

// See pf_top_k.
void top_k(const float * logits, int32_t n_vocab, int32_t k, int32_t * ids, float * logp);

class Sampler {
  public:
    Sampler(int32_t n_vocab, const pf_generate_params & params); // throws Error on settings out of range
    bool greedy() const;
    int32_t sample(const float * logits, int64_t position);      // allocates nothing
    void probs(const float * logits, double * out);              // [n_vocab], sums to 1

  private:
    int32_t n_vocab_;
    float temperature_;
    int32_t top_k_;
    float top_p_;
    float min_p_;
    uint64_t seed_;
    std::vector<float> work_;      // sized in the constructor
    std::vector<int32_t> order_;
};

} // namespace pf
