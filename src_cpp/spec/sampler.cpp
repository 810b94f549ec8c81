// Weights are floats relative to the likeliest token's, sums are doubles.
#include "spec/sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "error.h"
#include "spec/philox.h"

namespace pf {
namespace {

constexpr int32_t block = 256;

double sum(const float * weight, int32_t n) {
    constexpr int32_t lanes = 8;
    double lane[lanes] = {};
    int32_t i = 0;
    for (; i + lanes <= n; i += lanes) {
        for (int32_t j = 0; j < lanes; ++j) {
            lane[j] += weight[i + j];
        }
    }
    double total = 0;
    for (; i < n; ++i) {
        total += weight[i];
    }
    for (int32_t j = 0; j < lanes; ++j) {
        total += lane[j];
    }
    return total;
}

// The smallest float that is not below x.
float not_below(double x) {
    const auto near = static_cast<float>(x);
    return near < x ? std::nextafter(near, std::numeric_limits<float>::infinity()) : near;
}

} // namespace

Sampler::Sampler(int32_t n_vocab, const pf_generate_params & params)
    : n_vocab_(n_vocab), temperature_(params.temperature),
      top_k_(params.top_k == 0 ? n_vocab : std::min(params.top_k, n_vocab)), top_p_(params.top_p), min_p_(params.min_p),
      seed_(params.seed) {
    require(n_vocab >= 1, "n_vocab must be at least 1");
    require(temperature_ >= 0 && std::isfinite(temperature_), "temperature must be a number from 0 (greedy) up");
    require(params.top_k >= 0, "top_k must be 0 (off) or more");
    require(top_p_ >= 0 && top_p_ <= 1, "top_p must be within 0 to 1 (off)");
    require(min_p_ >= 0 && min_p_ <= 1, "min_p must be within 0 (off) to 1");
    if (!greedy()) {
        weight_.resize(static_cast<size_t>(n_vocab));
        block_sum_.resize((static_cast<size_t>(n_vocab) + block - 1) / block);
        if (top_k_ < n_vocab || top_p_ < 1) {
            key_.resize(static_cast<size_t>(n_vocab));
        }
    }
}

int32_t Sampler::sample(const float * logits, int64_t position) {
    if (greedy()) {
        return argmax(logits, n_vocab_);
    }
    return draw(uniform(seed_, position) * weigh(logits));
}

void Sampler::probs(const float * logits, double * out) {
    if (greedy()) {
        std::fill_n(out, n_vocab_, 0.0);
        out[argmax(logits, n_vocab_)] = 1;
        return;
    }
    const double total = weigh(logits);
    std::transform(weight_.begin(), weight_.end(), out, [total](float weight) { return weight / total; });
}

// Fills weight_ and block_sum_, tokens that are not kept at 0, and returns the sum.
double Sampler::weigh(const float * logits) {
    const float max = max_logit(logits, n_vocab_);
    const auto sum_blocks = [&](auto && fill) {
        double total = 0;
        for (size_t b = 0; b < block_sum_.size(); ++b) {
            const auto start = static_cast<int32_t>(b) * block;
            const int32_t count = std::min(block, n_vocab_ - start);
            fill(start, count);
            total += block_sum_[b] = sum(&weight_[static_cast<size_t>(start)], count);
        }
        return total;
    };
    const double total = sum_blocks([&](int32_t start, int32_t count) {
        exp_weights(logits + start, count, max, temperature_, &weight_[static_cast<size_t>(start)]);
    });
    if (top_k_ == n_vocab_ && top_p_ == 1 && min_p_ == 0) {
        return total;
    }

    // Every filter keeps the head of the same order (logit falling, then id), so what all of them keep is the shortest
    // of the heads. min-p speaks of ratios, which dropping other tokens does not change, and it never drops the first.
    const uint64_t last = last_kept(logits, total);
    const int32_t last_id = rank_key_id(last);
    const float last_logit = key_.empty() ? -std::numeric_limits<float>::infinity() : logits[last_id];
    const float floor = not_below(max + temperature_ * std::log(min_p_));
    return sum_blocks([&](int32_t start, int32_t count) {
        for (int32_t i = start; i < start + count; ++i) {
            const bool kept = (logits[i] > last_logit) | ((logits[i] == last_logit) & (i <= last_id));
            weight_[static_cast<size_t>(i)] *= static_cast<float>(kept & (logits[i] >= floor));
        }
    });
}

// The key (rank_key) of the last token, in order, that top-k and top-p keep.
uint64_t Sampler::last_kept(const float * logits, double total) {
    if (key_.empty()) {
        return 0;
    }
    const auto weight = [this](uint64_t key) { return weight_[static_cast<size_t>(rank_key_id(key))]; };
    uint64_t * const keys = key_.data();
    int32_t n_keys = 0;
    if (top_k_ < n_vocab_) {
        n_keys = top_k_;
        best_keys(logits, n_vocab_, n_keys, keys);
        total = 0;
        for (int32_t i = 0; i < n_keys; ++i) {
            total += weight(keys[i]);
        }
    } else {
        // The tokens below this weight hold less than 1 - top_p all together, so none of them is kept.
        const double least = (1 - top_p_) * total / n_vocab_;
        for (int32_t i = 0; i < n_vocab_; ++i) {
            if (weight_[static_cast<size_t>(i)] >= least) {
                keys[n_keys++] = rank_key(logits[i], i);
            }
        }
    }
    // top-p keeps a token when what is before it in order holds less than top_p of the weight; the first always. The
    // number kept lies in low + 1 .. high: halve that, without sorting what is in between.
    int32_t low = 0;
    int32_t high = n_keys;
    double before = 0; // weight of keys[0 .. low)
    while (top_p_ < 1 && high - low > 1) {
        const int32_t middle = low + (high - low) / 2;
        std::nth_element(keys + low, keys + middle, keys + high, std::greater<>());
        double half = 0;
        for (int32_t i = low; i < middle; ++i) {
            half += weight(keys[i]);
        }
        if (before + half < top_p_ * total) {
            before += half;
            low = middle;
        } else {
            high = middle;
        }
    }
    return *std::min_element(keys, keys + high);
}

// The token whose stretch of [0, sum of weights) holds target, the stretches lying in the order of ids. In the order of
// likelihood, two nearly equal tokens would swap places when logits differ in the last digit, as they do between a tree
// and plain decoding, and a draw far from any border would change with them; by id borders move a hair and none jumps.
int32_t Sampler::draw(double target) const {
    size_t b = 0;
    double sum = 0;
    while (b + 1 < block_sum_.size() && sum + block_sum_[b] <= target) {
        sum += block_sum_[b++];
    }
    int32_t token = -1;
    for (auto i = static_cast<int32_t>(b) * block; i < n_vocab_; ++i) {
        const float weight = weight_[static_cast<size_t>(i)];
        if (weight > 0) {
            token = i;
            sum += weight;
            if (sum > target) {
                break;
            }
        }
    }
    return token;
}

} // namespace pf
