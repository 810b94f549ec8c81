#include "spec/penalties.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <string>

#include "error.h"

namespace pf {
namespace {

constexpr float max_bias = 1000;
constexpr float max_penalty = 100;

bool within(float value, float low, float high) {
    return value >= low && value <= high; // NaN is not
}

[[noreturn]] void refuse(int32_t token, const std::string & why) {
    throw Error(PF_ERR_ARGUMENT, "logit_bias: token " + std::to_string(token) + " " + why);
}

} // namespace

Penalties::Penalties(int32_t n_vocab, const pf_generate_params & params)
    : repeat_(params.repeat_penalty), presence_(params.presence_penalty), frequency_(params.frequency_penalty) {
    require(within(repeat_, 1 / max_penalty, max_penalty), "repeat_penalty must be within 0.01 to 100 (1: off)");
    require(within(presence_, -max_penalty, max_penalty), "presence_penalty must be within -100 to 100 (0: off)");
    require(within(frequency_, -max_penalty, max_penalty), "frequency_penalty must be within -100 to 100 (0: off)");
    require(params.n_bias == 0 || (params.bias_ids && params.bias), "n_bias is set, but bias_ids or bias is null");
    uint64_t n_forbidden = 0;
    for (uint64_t i = 0; i < params.n_bias; ++i) {
        const Bias bias{params.bias_ids[i], params.bias[i]};
        const bool forbidden = std::isinf(bias.value) && bias.value < 0;
        if (bias.token < 0 || bias.token >= n_vocab) {
            refuse(bias.token, "is not in the vocabulary, which has " + std::to_string(n_vocab) + " tokens");
        }
        if (!forbidden && !within(bias.value, -max_bias, max_bias)) {
            refuse(bias.token, "must be biased by -1000 to 1000, or by -inf to forbid it");
        }
        n_forbidden += forbidden;
        bias_.push_back(bias);
    }
    const auto by_token = [](const Bias & a, const Bias & b) { return a.token < b.token; };
    std::sort(bias_.begin(), bias_.end(), by_token);
    for (size_t i = 1; i < bias_.size(); ++i) {
        if (bias_[i - 1].token == bias_[i].token) {
            refuse(bias_[i].token, "is named twice");
        }
    }
    require(n_forbidden < static_cast<uint64_t>(n_vocab), "logit_bias forbids every token");
}

void Penalties::apply(float * logits, const TokenCounts & counts) const {
    // -inf stays, it means something; what leaves float's range does not become it.
    const auto set = [](float & logit, float value) {
        logit = std::isinf(logit) ? logit : std::clamp(value, -FLT_MAX, FLT_MAX);
    };
    for (const Bias & bias : bias_) {
        float & logit = logits[bias.token];
        std::isinf(bias.value) ? void(logit = bias.value) : set(logit, logit + bias.value);
    }
    if (!penalises()) {
        return;
    }
    for (const int32_t token : counts.distinct()) {
        float & logit = logits[token];
        set(logit, logit > 0 ? logit / repeat_ : logit * repeat_);
        if (const int32_t said = counts.of(token).output) {
            set(logit, logit - (presence_ + frequency_ * static_cast<float>(said)));
        }
    }
}

} // namespace pf
