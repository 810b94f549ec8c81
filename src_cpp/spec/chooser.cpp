#include "spec/chooser.h"

#include <algorithm>

#include "error.h"
#include "spec/logits.h"

namespace pf {

void Chooser::configure(const pf_generate_params & params) {
    require(params.n_logprobs >= -1 && params.n_logprobs <= std::min(PF_MAX_LOGPROBS, n_vocab_),
            "n_logprobs must be -1 (off) to 20, and no more than there are tokens");
    Sampler sampler(n_vocab_, params);
    Penalties penalties(n_vocab_, params);
    path_.reserve(PF_MAX_NODES);
    sampler_ = std::move(sampler);
    penalties_ = std::move(penalties);
    n_logprobs_ = params.n_logprobs;
    reported_ = false;
}

void Chooser::begin() {
    path_.clear();
    logp_.clear();
    top_ids_.clear();
    top_logp_.clear();
    reported_ = n_logprobs_ >= 0;
}

int32_t Chooser::choose(const float * logits, int64_t position, Constraint * constraint) {
    const int32_t token = sampler_->sample(shaped(logits, constraint), position);
    if (n_logprobs_ >= 0) {
        report(logits, token);
    }
    counts.say(token);
    path_.push_back(token);
    return token;
}

void Chooser::end() {
    for (; !path_.empty(); path_.pop_back()) {
        counts.unsay(path_.back());
    }
}

void Chooser::probs(const float * logits, double * out) {
    sampler_->probs(shaped(logits, nullptr), out);
}

const float * Chooser::shaped(const float * logits, Constraint * constraint) {
    if (!constraint && !penalties_->any()) {
        return logits;
    }
    max_logit(logits, n_vocab_); // what is wrong with the model's row is said of that
    row_.assign(logits, logits + n_vocab_);
    if (constraint) {
        constraint->mask(path_.data(), static_cast<int32_t>(path_.size()), row_.data());
    }
    penalties_->apply(row_.data(), counts);
    if (!usable_logits(row_.data(), n_vocab_)) {
        throw Error(PF_ERR_ARGUMENT, constraint
                                         ? "logit_bias, or the model, forbids every token that the constraint allows"
                                         : "logit_bias forbids every token that the model would say");
    }
    return row_.data();
}

void Chooser::report(const float * logits, int32_t token) {
    const LogSoftmax row(logits, n_vocab_);
    logp_.push_back(row.of_logit(logits[token]));
    const size_t n_before = top_ids_.size();
    top_ids_.resize(n_before + static_cast<size_t>(n_logprobs_));
    top_logp_.resize(top_ids_.size());
    if (n_logprobs_ > 0) {
        top_k(logits, n_vocab_, row, n_logprobs_, top_ids_.data() + n_before, top_logp_.data() + n_before);
    }
}

void Chooser::logprobs(float * logp, int32_t * top_ids, float * top_logp) const {
    if (!reported_) {
        throw Error(PF_ERR_STATE, "there are no log-probabilities: no step has been made with n_logprobs 0 or more");
    }
    std::copy(logp_.begin(), logp_.end(), logp);
    std::copy(top_ids_.begin(), top_ids_.end(), top_ids);
    std::copy(top_logp_.begin(), top_logp_.end(), top_logp);
}

} // namespace pf
