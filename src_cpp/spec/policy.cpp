#include "spec/policy.h"

#include <algorithm>
#include <cmath>

namespace pf {
namespace {

constexpr double fade = 0.98;         // of a step in the rate, from one to the next
constexpr double spared = 0.01;       // of all time
constexpr double most_spared = 4;     // plain steps' worth of it, or of what is wanted if that is more
constexpr int64_t long_unused = 1000; // passes
// More than a root must be worth so much more than its time: chances are means over text that was easier or harder, and a
// pass of another size finds the processor's caches cold.
constexpr double caution = 1.05;

} // namespace

void Policy::begin(int64_t n) {
    row_ = Costs::row_of(n);
}

double Policy::price() const {
    const double plain = 1 / costs.row(row_).pass[0];
    return ms_ > 0 ? std::max(plain, tokens_ / ms_) : plain;
}

int32_t Policy::to_measure(int32_t most) {
    int64_t age = 0;
    const int32_t size = costs.stalest(row_, most, age);
    const double ms = costs.row(row_).pass[size];
    if (age < long_unused || spare_ms_ < ms) {
        return -1;
    }
    spare_ms_ -= ms;
    return size;
}

Policy::Choice Policy::choose(const Tree & tree, int32_t most) const {
    double chance[PF_MAX_NODES]; // in the order of taking, likeliest first
    for (int32_t i = 0; i < tree.n_nodes; ++i) {
        chance[tree.taken[i]] = std::exp(static_cast<double>(tree.score[i]));
    }
    const double ms_price = price();
    const auto & pass = costs.row(row_).pass;
    Choice best{1, 1 - ms_price * pass[0]};
    double expected = 0;
    for (int32_t i = 0, n = 0; i < n_pass_sizes && pass_sizes[i] <= most && n < tree.n_nodes; ++i) {
        for (; n < std::min(pass_sizes[i], tree.n_nodes); ++n) {
            expected += chance[n];
        }
        const double value = expected - ms_price * pass[i] * (i > 0 ? caution : 1);
        if (value > best.value) {
            best = {n, value};
        }
    }
    return best;
}

bool Policy::drafts(bool proposed) {
    const Gain & gain = gain_[proposed];
    const double ms = costs.row(row_).draft;
    const double worth = gain.mean / price(); // milliseconds
    if (!gain.known || worth >= ms) {
        return true;
    }
    if (spare_ms_ >= ms - worth) {
        spare_ms_ -= ms - worth;
        return true;
    }
    return false;
}

void Policy::drafted(const Choice & without, const Choice & with, bool proposed) {
    Gain & gain = gain_[proposed];
    const double seen = std::max(0.0, with.value - without.value);
    // Text changes: the longer ago the last draft was, the less it still says.
    const double weight = gain.known ? std::clamp(gain.tokens_since / 64.0, 1 / 16.0, 0.5) : 1;
    gain.mean += weight * (seen - gain.mean);
    gain.known = true;
    gain.tokens_since = 0;
}

void Policy::finished(int32_t n_tokens, int32_t n_nodes, double draft_ms, double pass_ms, bool typical) {
    for (Gain & gain : gain_) {
        gain.tokens_since = std::min(gain.tokens_since + n_tokens, 1 << 20);
    }
    if (!typical) {
        return;
    }
    const int32_t size = pass_size_of(n_nodes);
    if (pass_sizes[size] == n_nodes) {
        costs.saw_pass(row_, size, pass_ms);
    }
    if (draft_ms > 0) {
        costs.saw_draft(row_, draft_ms);
    }
    const double ms = draft_ms + pass_ms;
    tokens_ = fade * tokens_ + n_tokens;
    ms_ = fade * ms_ + ms;
    const auto & now = costs.row(row_);
    const double most = std::max({most_spared * now.pass[0], now.draft, now.pass[n_pass_sizes - 1]});
    spare_ms_ = std::min(spare_ms_ + spared * ms, most);
}

void Policy::save(double * out) const {
    costs.save(out);
    out += Costs::n_values;
    for (const Gain & gain : gain_) {
        *out++ = gain.mean;
        *out++ = gain.known ? 1 : 0;
    }
}

bool Policy::load(const double * values) {
    Policy read;
    if (!read.costs.load(values)) {
        return false;
    }
    values += Costs::n_values;
    for (Gain & gain : read.gain_) {
        gain.mean = *values++;
        gain.known = *values++ != 0;
        gain.tokens_since = 1 << 10;
        if (!(gain.mean >= 0 && gain.mean <= PF_MAX_NODES)) {
            return false;
        }
    }
    *this = read;
    return true;
}

} // namespace pf
