// The passes are written on vectors of four floats (an extension that GCC and Clang share), which every processor we
// build for has. Left to itself the compiler does not vectorise choices between floats.
#include "spec/logits.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "error.h"

namespace pf {
namespace {

using floats = float __attribute__((vector_size(16)));
using ints = int32_t __attribute__((vector_size(16)));

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr int32_t width = 4;
constexpr int32_t block = 256;

floats load(const float * from) {
    floats x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

// The last, incomplete vector of a row.
floats load(const float * from, int32_t count, float rest) {
    floats x = floats{} + rest;
    std::memcpy(&x, from, static_cast<size_t>(count) * sizeof *from);
    return x;
}

struct Peak {
    float max;  // of what is not NaN
    bool wrong; // NaN or +inf among them
};

Peak peak(const float * x, int32_t n) {
    constexpr int32_t n_chains = 4; // independent, to hide latency
    floats max[n_chains];
    ints wrong[n_chains] = {};
    std::fill_n(max, n_chains, floats{} - inf);
    const auto add = [&](int32_t chain, floats values) {
        max[chain] = values > max[chain] ? values : max[chain];
        wrong[chain] |= ~(values < inf);
    };
    int32_t i = 0;
    for (; i + n_chains * width <= n; i += n_chains * width) {
        for (int32_t c = 0; c < n_chains; ++c) {
            add(c, load(x + i + c * width));
        }
    }
    for (; i < n; i += width) {
        add(0, load(x + i, std::min(width, n - i), -inf));
    }
    Peak all{-inf, false};
    for (int32_t c = 0; c < n_chains; ++c) {
        for (int32_t j = 0; j < width; ++j) {
            all.max = std::max(all.max, max[c][j]);
            all.wrong |= wrong[c][j] != 0;
        }
    }
    return all;
}

[[noreturn]] void throw_unusable(const float * logits, int32_t n_vocab) {
    for (int32_t i = 0; i < n_vocab; ++i) {
        if (!(logits[i] < inf)) {
            throw Error(PF_ERR_INTERNAL, "the model produced logits that are not finite (" +
                                             std::string(std::isnan(logits[i]) ? "NaN" : "+inf") + " at token " +
                                             std::to_string(i) + "); its weights are damaged or overflow");
        }
    }
    throw Error(PF_ERR_INTERNAL, "every logit is -inf, so no token can be chosen");
}

// exp(x) for x <= 0: x = n ln 2 + r with |r| <= ln 2 / 2, and the Taylor series of exp(r), whose first term left out is
// r^8 / 8! < 6e-9. What would not be a normal number is 0.
floats exp_of_negative(floats x) {
    constexpr float lowest = -87.33654f;     // exp gives the smallest normal number
    constexpr float round_bias = 12582912.f; // 1.5 * 2^23: adding it leaves no fraction bits
    constexpr float ln2_high = 0x1.62e4p-1f; // few bits, so that n * ln2_high is exact
    constexpr float ln2_low = 1.42860682e-6f;
    const ints normal = x > lowest;
    const floats y = normal ? x : floats{} + lowest;
    const floats n = (y * 1.44269504f + round_bias) - round_bias;
    const floats r = (y - n * ln2_high) - n * ln2_low;
    floats p = r * (1.f / 5040) + 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    const ints power = (__builtin_convertvector(n, ints) + 127) << 23; // the bits of 2^n, n in -126 .. 0
    return reinterpret_cast<floats>(reinterpret_cast<ints>(p * reinterpret_cast<floats>(power)) & normal);
}

double sum_exp(const float * x, int32_t n, float max) {
    double total = 0;
    for (int32_t start = 0; start < n; start += block) {
        const int32_t end = std::min(start + block, n);
        floats sum{}; // of at most 64 each in float; of these in double
        int32_t i = start;
        for (; i + width <= end; i += width) {
            sum += exp_of_negative(load(x + i) - max);
        }
        if (i < end) {
            sum += exp_of_negative(load(x + i, end - i, -inf) - max);
        }
        for (int32_t j = 0; j < width; ++j) {
            total += sum[j];
        }
    }
    return total;
}

// best_keys for few k; keys holds k. A heap with the worst of them on top; blocks that cannot beat it are skipped.
void heap_best_keys(const float * logits, int32_t n_vocab, int32_t k, uint64_t * keys) {
    for (int32_t i = 0; i < k; ++i) {
        keys[i] = rank_key(logits[i], i);
    }
    std::make_heap(keys, keys + k, std::greater<>());
    for (int32_t start = k; start < n_vocab; start += block) {
        const int32_t end = std::min(start + block, n_vocab);
        if (rank_key(peak(logits + start, end - start).max, start) < keys[0]) {
            continue;
        }
        for (int32_t i = start; i < end; ++i) {
            const uint64_t key = rank_key(logits[i], i);
            if (key > keys[0]) {
                std::pop_heap(keys, keys + k, std::greater<>());
                keys[k - 1] = key;
                std::push_heap(keys, keys + k, std::greater<>());
            }
        }
    }
}

} // namespace

void exp_weights(const float * logits, int32_t n, float max, float temperature, float * weights) {
    for (int32_t i = 0; i < n; i += width) {
        const int32_t count = std::min(width, n - i);
        const floats x = count == width ? load(logits + i) : load(logits + i, count, max);
        const floats weight = exp_of_negative((x - max) / temperature);
        std::memcpy(weights + i, &weight, static_cast<size_t>(count) * sizeof *weights);
    }
}

bool usable_logits(const float * logits, int32_t n_vocab) {
    const Peak row = peak(logits, n_vocab);
    return !row.wrong && row.max > -inf;
}

float max_logit(const float * logits, int32_t n_vocab) {
    const Peak row = peak(logits, n_vocab);
    if (row.wrong || row.max == -inf) {
        throw_unusable(logits, n_vocab);
    }
    return row.max;
}

int32_t argmax(const float * logits, int32_t n_vocab) {
    const float max = max_logit(logits, n_vocab);
    return static_cast<int32_t>(std::find(logits, logits + n_vocab, max) - logits);
}

void best_keys(const float * logits, int32_t n_vocab, int32_t k, uint64_t * keys) {
    if (k <= n_vocab / 8) {
        heap_best_keys(logits, n_vocab, k, keys);
        return;
    }
    for (int32_t i = 0; i < n_vocab; ++i) {
        keys[i] = rank_key(logits[i], i);
    }
    if (k < n_vocab) {
        std::nth_element(keys, keys + k, keys + n_vocab, std::greater<>());
    }
}

LogSoftmax::LogSoftmax(const float * logits, int32_t n_vocab)
    : max(max_logit(logits, n_vocab)), log_sum(std::log(sum_exp(logits, n_vocab, static_cast<float>(max)))) {}

float LogSoftmax::of_logit(float logit) const {
    // The difference of two finite floats may not fit in one.
    const double value = (logit - max) - log_sum;
    return logit == -inf ? logit : static_cast<float>(std::max(value, -static_cast<double>(FLT_MAX)));
}

void top_k(const float * logits, int32_t n_vocab, int32_t k, int32_t * ids, float * logp) {
    top_k(logits, n_vocab, LogSoftmax(logits, n_vocab), k, ids, logp);
}

void top_k(const float * logits, int32_t n_vocab, const LogSoftmax & row, int32_t k, int32_t * ids, float * logp) {
    constexpr int32_t few = 64;
    uint64_t few_keys[few];
    std::vector<uint64_t> many_keys;
    uint64_t * keys = few_keys;
    if (k <= few) {
        heap_best_keys(logits, n_vocab, k, keys);
    } else {
        many_keys.resize(static_cast<size_t>(n_vocab));
        keys = many_keys.data();
        best_keys(logits, n_vocab, k, keys);
    }
    std::sort(keys, keys + k, std::greater<>());
    for (int32_t i = 0; i < k; ++i) {
        ids[i] = rank_key_id(keys[i]);
        logp[i] = row.of_logit(logits[ids[i]]);
    }
}

} // namespace pf
