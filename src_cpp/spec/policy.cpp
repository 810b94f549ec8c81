#include "spec/policy.h"

#include <algorithm>
#include <cmath>

namespace pf {
namespace {

constexpr double fade = 0.98;         // of a step in the rate, from one to the next
constexpr double n_behind = 16;       // drafts that the mean of what they do to passes looks back on
constexpr double reserve = 4;         // drafts' worth of what drafts gave beyond their time
constexpr double spared = 0.01;       // of all time, for drafts that may not pay
constexpr double most_spared = 2;     // drafts' worth of it; as much has come together where nothing was easy
constexpr double unsure = 0.5;        // of how unsure the target usually is, for a text that is easy
constexpr int64_t n_lately = 4;       // passes
constexpr int64_t n_usually = 256;    // passes
constexpr double measuring = 0.005;   // of all time, at most
constexpr int64_t long_unused = 1000; // passes
// More than a root must be worth so much more than its time: chances are means over text that was easier or harder, and a
// pass of another size than the last finds the caches cold, whatever made it another.
constexpr double caution = 1.05;

double largest(const std::array<double, n_draft_sizes> & ms) {
    return *std::max_element(ms.begin(), ms.end());
}

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

// What drafts take, with what the pass behind one takes more than it would without: other things are in the processor's
// caches then.
Policy::DraftCosts Policy::draft_costs() const {
    DraftCosts draft = costs.row(row_).draft;
    for (double & ms : draft) {
        ms += std::max(0.0, behind_ms_);
    }
    return draft;
}

int32_t Policy::drafts(bool proposed, int32_t n_sizes) {
    const int32_t full = n_sizes - 1;
    const DraftCosts ms = draft_costs();
    const double ms_price = price();
    const auto gain = [&](int32_t size) -> const Gain & { return gain_[proposed ? n_draft_sizes : size]; };
    const auto profit = [&](int32_t size) { return gain(size).mean / ms_price - ms[(size_t) size]; };
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
    const bool easy = 1 - lately_ < unsure * (1 - usually_);
    if (spare_ms_ >= (easy ? lost : most_spared * largest(ms))) {
        spare_ms_ -= lost;
        return full;
    }
    return trusted ? best : -1;
}

Policy::Choice Policy::drafted(int32_t size, bool proposed, const Choice & without, const Tree & tree, int32_t most) {
    drafted_ = size;
    const Choice best = choose(tree, most);
    const DraftCosts ms = draft_costs();
    const double ms_price = price(), most_owed = largest(ms);
    double earned = -most_owed; // by the size that would have been best: full ones are made for what they tell of all
    const auto saw = [&](Gain & gain, int32_t i, const Choice & choice) {
        const double tokens = std::max(0.0, choice.value - without.value);
        gain.saw(tokens);
        earned = std::max(earned, tokens / ms_price - ms[(size_t) i]);
    };
    if (proposed) {
        saw(gain_[n_draft_sizes], size, best);
    }
    for (int32_t i = 0; i <= size && !proposed; ++i) {
        saw(gain_[i], i, i == size ? best : choose(tree, most, draft_sizes[(size_t) i]));
    }
    credit_ms_ = std::clamp(credit_ms_ + earned, -most_owed, reserve * most_owed);
    return best;
}

void Policy::saw_target(double logp) {
    ++n_targets_;
    lately_ += (std::exp(logp) - lately_) / std::min(n_targets_, n_lately);
    usually_ += (std::exp(logp) - usually_) / std::min(n_targets_, n_usually);
}

void Policy::Gain::saw(double tokens) {
    // Text changes: the longer ago the last draft was, the less it still says.
    const double weight = known ? std::clamp(tokens_since / 64.0, 0.25, 0.5) : 1;
    mean += weight * (tokens - mean);
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
    double alone_ms = pass_ms; // what the pass takes without a draft before it
    if (draft_ms > 0) {
        const double most = costs.row(row_).pass[(size_t) size]; // a hiccup goes no further
        behind_ms_ += (std::clamp(pass_ms - most, -most, most) - behind_ms_) / n_behind;
        alone_ms = std::max(pass_ms / 2, pass_ms - behind_ms_);
        costs.saw_draft(row_, drafted_, draft_ms);
    }
    if (pass_sizes[size] == n_nodes) {
        costs.saw_pass(row_, size, alone_ms);
    }
    const double ms = draft_ms + pass_ms;
    tokens_ = fade * tokens_ + n_tokens;
    ms_ = fade * ms_ + ms;
    spare_ms_ = std::min(spare_ms_ + spared * ms, most_spared * largest(draft_costs()));
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
