// The target's choice at each node that the walk through the tree visits, and what is reported of it. The constraint's
// mask, bias and penalties, then the sampler; they see the tokens of the timeline and those chosen on the way to the node.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "constraint.h"
#include "penalties.h"
#include "pydflash.h"
#include "sampler.h"
#include "token_counts.h"

namespace pf {

class Chooser {
  public:
    explicit Chooser(int32_t n_vocab) : counts(n_vocab), n_vocab_(n_vocab) {}

    // Throws Error on settings out of range, before anything changes.
    void configure(const pf_generate_params & params);

    // Whether choosing takes rows of logits. Else, without a constraint, it is their argmax, which the device gives.
    bool reads_logits() const { return !sampler_->greedy() || penalties_->any() || n_logprobs_ >= 0; }

    // One step: begin, choose at each node from the root down, end, which forgets the way. choose throws on a row that
    // is not usable (logits.h), or where nothing is left to choose from. constraint may be null.
    void begin();
    int32_t choose(const float * logits, int64_t position, Constraint * constraint);
    void end();
    // The distribution that choose draws from.
    void probs(const float * logits, double * out);

    // See pf_session_logprobs.
    void logprobs(float * logp, int32_t * top_ids, float * top_logp) const;

    // Of the timeline: whoever moves that keeps them up to date.
    TokenCounts counts;

  private:
    const float * shaped(const float * logits, Constraint * constraint);
    void report(const float * logits, int32_t token);

    int32_t n_vocab_;
    std::optional<Sampler> sampler_; // both there once configured
    std::optional<Penalties> penalties_;
    std::vector<float> row_;    // [n_vocab] once there was a mask or a penalty
    std::vector<int32_t> path_; // chosen in this step

    int32_t n_logprobs_ = -1;
    bool reported_ = false;   // of the last step
    std::vector<float> logp_; // [n_tokens]
    std::vector<int32_t> top_ids_;
    std::vector<float> top_logp_; // [n_tokens, n_logprobs]
};

} // namespace pf
