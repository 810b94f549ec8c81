#include "spec/policy.h"

#include <algorithm>
#include <cmath>

namespace pf {
namespace {

constexpr double fade = 0.98;     // of a step in the rate, from one to the next
constexpr double spared = 0.01;   // of all time, for drafts that may not pay
constexpr double most_spared = 2; // drafts' worth of it; as much has come together where the target was never sure
constexpr double n_lately = 4, n_usually = 256; // tokens
constexpr double unsure = 0.5;        // of how unsure the target usually is: where drafts that may not pay are made
constexpr double measuring = 0.005;   // of all time, at most
constexpr double reserve = 4;         // drafts' worth of what drafts gave beyond their time
constexpr int64_t long_unused = 1000; // passes
// More than a root must be worth so much more than its time: chances are means over text that was easier or harder, and a
// pass of another size finds the processor's caches cold.
constexpr double caution = 1.05;

} // namespace

void Policy::begin(int64_t n) {
    row_ = Costs::row_of(n);
}

double Policy::price() const {
    const double plain = 1 / costs.plain(row_);
    return ms_ > 0 ? std::max(plain, tokens_ / ms_) : plain;
}

int32_t Policy::to_measure(int32_t most) {
    int64_t age = 0;
    const int32_t size = costs.stalest(row_, most, age);
    const double ms = costs.row(row_).pass[size];
    if (age < long_unused || measuring * unmeasured_ms_ < ms) {
        return -1;
    }
    unmeasured_ms_ = 0;
    return size;
}

Policy::Choice Policy::choose(const Tree & tree, int32_t most, int32_t max_depth) const {
    double chance[PF_MAX_NODES]; // in the order of taking, likeliest first
    int32_t n_chances = 0;
    int32_t order[PF_MAX_NODES];
    for (int32_t i = 0; i < tree.n_nodes; ++i) {
        order[tree.taken[i]] = i;
    }
    for (int32_t t = 0; t < tree.n_nodes; ++t) {
        if (tree.depth[order[t]] <= max_depth) {
            chance[n_chances++] = std::exp(static_cast<double>(tree.score[order[t]]));
        }
    }
    const double ms_price = price();
    auto pass = costs.row(row_).pass;
    for (int32_t i = n_pass_sizes - 1; i-- > 1;) { // no pass can take longer than a larger one: it was measured badly
        if (pass_sizes[i + 1] <= most) {
            pass[i] = std::min(pass[i], pass[i + 1]);
        }
    }
    Choice best{1, 1 - ms_price * pass[0]};
    double expected = 0;
    for (int32_t i = 0, n = 0; i < n_pass_sizes && pass_sizes[i] <= most && n < n_chances; ++i) {
        for (; n < std::min(pass_sizes[i], n_chances); ++n) {
            expected += chance[n];
        }
        const double value = expected - ms_price * pass[i] * (i > 0 ? caution : 1);
        if (value > best.value) {
            best = {n, value};
        }
    }
    return best;
}

int32_t Policy::drafts(bool proposed, int32_t n_sizes) {
    const int32_t full = n_sizes - 1;
    const auto ms = costs.row(row_).draft;
    const double ms_price = price();
    const auto gain = [&](int32_t size) -> const Gain & { return gain_[proposed ? n_draft_sizes : size]; };
    const auto profit = [&](int32_t size) { return gain(size).mean / ms_price - ms[size]; }; // milliseconds
    int32_t best = -1;
    double most = 0;
    for (int32_t size = proposed ? full : 0; size <= full; ++size) {
        if (profit(size) > most) {
            best = size;
            most = profit(size);
        }
    }
    const bool trusted = credit_ms_ >= 0;
    if (!gain(full).known || (trusted && best == full)) {
        return full;
    }
    const double lost = trusted ? most - profit(full) : ms[(size_t) full]; // by a full one
    const bool sure = 1 - lately_ < unsure * (1 - usually_);
    if (spare_ms_ >= (sure ? lost : most_spared * *std::max_element(ms.begin(), ms.end()))) {
        spare_ms_ -= lost;
        return full;
    }
    return trusted ? best : -1;
}

Policy::Choice Policy::drafted(int32_t size, bool proposed, const Choice & without, const Tree & tree, int32_t most) {
    drafted_ = size;
    const Choice best = choose(tree, most);
    const double gained = std::max(0.0, best.value - without.value);
    const auto ms = costs.row(row_).draft;
    const double largest = *std::max_element(ms.begin(), ms.end());
    credit_ms_ = std::clamp(credit_ms_ + gained / price() - ms[(size_t) size], -largest, reserve * largest);
    if (proposed) {
        gain_[n_draft_sizes].saw(gained);
        return best;
    }
    for (int32_t i = 0; i <= size; ++i) {
        gain_[i].saw(i == size ? gained : choose(tree, most, draft_sizes[i]).value - without.value);
    }
    return best;
}

void Policy::saw_target(double logp) {
    lately_ += (std::exp(logp) - lately_) / n_lately;
    usually_ += (std::exp(logp) - usually_) / n_usually;
}

void Policy::Gain::saw(double tokens) {
    // Text changes: the longer ago the last draft was, the less it still says.
    const double weight = known ? std::clamp(tokens_since / 64.0, 0.25, 0.5) : 1;
    mean += weight * (std::max(0.0, tokens) - mean);
    known = true;
    tokens_since = 0;
}

void Policy::finished(int32_t n_tokens, int32_t n_nodes, double draft_ms, double pass_ms, bool typical) {
    for (Gain & gain : gain_) {
        gain.tokens_since = std::min(gain.tokens_since + n_tokens, 1 << 20);
    }
    if (!typical) {
        return;
    }
    const int32_t size = pass_size_of(n_nodes);
    if (draft_ms > 0) { // behind a draft a pass finds the processor's caches cold: that is the draft's doing
        costs.saw_draft(row_, drafted_, std::max(draft_ms / 2, draft_ms + pass_ms - costs.row(row_).pass[size]));
    }
    if (pass_sizes[size] == n_nodes && (draft_ms == 0 || n_nodes > 1)) {
        costs.saw_pass(row_, size, pass_ms);
    }
    const double ms = draft_ms + pass_ms;
    tokens_ = fade * tokens_ + n_tokens;
    ms_ = fade * ms_ + ms;
    const auto draft = costs.row(row_).draft;
    spare_ms_ = std::min(spare_ms_ + spared * ms, most_spared * *std::max_element(draft.begin(), draft.end()));
    unmeasured_ms_ += ms;
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
