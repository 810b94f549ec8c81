// What is done to a row of logits before anything is chosen from it: the user's bias, then penalties on tokens that were
// there before.
#pragma once

#include <cstdint>
#include <vector>

#include "pydflash.h"
#include "token_counts.h"

namespace pf {

// Repetition: Keskar et al. 2019, "CTRL", with the sign that Hugging Face gave it: the logit of a token on the timeline
// is divided by the penalty where it is positive, and multiplied where not. Presence and frequency: OpenAI's; of a token
// of the output are taken off presence_penalty and, for each time it was said, frequency_penalty.
class Penalties {
  public:
    Penalties(int32_t n_vocab, const pf_generate_params & params); // throws Error on settings out of range
    bool any() const { return !bias_.empty() || penalises(); }
    void apply(float * logits, const TokenCounts & counts) const; // finite logits stay finite unless the bias forbids

  private:
    bool penalises() const { return repeat_ != 1 || presence_ != 0 || frequency_ != 0; }

    struct Bias {
        int32_t token;
        float value;
    };
    std::vector<Bias> bias_;
    float repeat_;
    float presence_;
    float frequency_;
};

} // namespace pf
