// The target's choice of one token from one row of logits: argmax, or the one draw that (seed, position) stand for, so
// that a position draws the same token however it is reached.
#pragma once

#include <cstdint>
#include <vector>

#include "logits.h"
#include "pydflash.h"

namespace pf {

// Temperature, then top-k, top-p and min-p, each on what the former left, as Hugging Face's logits warpers do; but
// where these keep every token that ties with the k-th, exactly k stay here (ties: lowest id).
class Sampler {
  public:
    Sampler(int32_t n_vocab, const pf_generate_params & params); // throws Error on settings out of range
    bool greedy() const { return temperature_ == 0; }
    // Both throw on a row that is not usable (logits.h).
    int32_t sample(const float * logits, int64_t position); // allocates nothing
    void probs(const float * logits, double * out);         // [n_vocab], sums to 1

  private:
    double weigh(const float * logits);
    uint64_t last_kept(const float * logits, double total);
    int32_t draw(double target) const;

    int32_t n_vocab_;
    float temperature_;
    int32_t top_k_; // n_vocab: off
    double top_p_;
    double min_p_;
    uint64_t seed_;
    // Work arrays, sized in the constructor.
    std::vector<float> weight_;     // [n_vocab], proportional to the probabilities
    std::vector<double> block_sum_; // of weight_
    std::vector<uint64_t> key_;     // [n_vocab] where top-k or top-p are on
};

} // namespace pf
