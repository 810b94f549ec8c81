// Passes over one row of logits: largest, best k, sum of exponentials.
//
// -inf is a masked token and welcome. A row with NaN, with +inf or with nothing but -inf is none: those functions that
// say so throw Error (PF_ERR_INTERNAL, since logits come from our own graphs).
#pragma once

#include <cstdint>
#include <cstring>

namespace pf {

// No NaN, no +inf, and something finite.
bool usable_logits(const float * logits, int32_t n_vocab);

// The largest logit; throws on a row that is not usable.
float max_logit(const float * logits, int32_t n_vocab);

// The token with the largest logit, ties by lowest id; throws on a row that is not usable.
int32_t argmax(const float * logits, int32_t n_vocab);

// Log-softmax over a whole row: of_logit(logits[i]) is the log-probability of token i. -inf for a masked token, a finite
// number for any other.
struct LogSoftmax {
    LogSoftmax(const float * logits, int32_t n_vocab); // throws on a row that is not usable
    float of_logit(float logit) const;

    double max;
    double log_sum; // log of the sum of exp(logit - max)
};

// See pf_top_k; throws on a row that is not usable.
// Allocates nothing for k up to 64.
void top_k(const float * logits, int32_t n_vocab, int32_t k, int32_t * ids, float * logp);
void top_k(const float * logits, int32_t n_vocab, const LogSoftmax & row, int32_t k, int32_t * ids, float * logp);

// weights[i] = exp((logits[i] - max) / temperature), and 0 below 2^-126; logits <= max. Relative error under 2e-7 plus
// the rounding of the argument.
void exp_weights(const float * logits, int32_t n, float max, float temperature, float * weights);

// One number per (logit, id) that sorts as the pair does: a larger logit first, at equal logits the lower id.
inline uint64_t rank_key(float logit, int32_t id) {
    const float value = logit + 0.0f; // -0 and 0 are equal
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
    return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}

inline int32_t rank_key_id(uint64_t key) {
    return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key));
}

// keys[0 .. k) become the k largest keys of the row, unsorted. keys holds n_vocab.
void best_keys(const float * logits, int32_t n_vocab, int32_t k, uint64_t * keys);

} // namespace pf
