#include "spec/costs.h"

#include <algorithm>
#include <cmath>

namespace pf {
namespace {

constexpr int32_t n_counted = 16;    // passes that a mean looks back on
constexpr double n_fresh = 64;       // passes until what was seen then goes all the way along with plain passes
constexpr int64_t kept_for = 1 << 9; // passes ago: what an earlier session saw
constexpr int64_t plain_every = 256; // passes

// A mean that forgets, and that a single hiccup of the machine cannot carry far.
double moved(double mean, double seen, int32_t n) {
    return n == 0 ? seen : mean + (std::clamp(seen, mean / 2, mean * 2) - mean) / (n + 1);
}

} // namespace

int32_t Costs::row_of(int64_t n) {
    int32_t row = 0;
    while (row + 1 < n_rows && n >= (int64_t) 1024 << row) {
        ++row;
    }
    return row;
}

// What was seen, at the pace of plain passes now; what is fresh stands by itself. Where they have become slower, so has all
// else. Where they have become faster, a longer pass has by no more than they did: that may be weights that stay in the
// processor's caches, which is nothing to one that is long because it computes.
double Costs::now(int32_t row, const Known & known) const {
    if (known.plain <= 0) {
        return known.ms;
    }
    const double by = plain(row) - known.plain, in_step = by * known.ms / known.plain;
    const double old = std::min(1.0, static_cast<double>(clock_ - known.last) / n_fresh);
    return known.ms + old * std::max(by > 0 ? in_step : by, in_step);
}

void Costs::see(int32_t row, Known & known, double ms) {
    const double mean = now(row, known);
    const Known & plain = rows_[row].pass[0];
    const bool is_plain = &known == &plain;
    int32_t n = known.n;
    // All of long ago counts no more than this; plain passes, whose pace all goes by, start anew.
    if (!is_fresh(known)) {
        const bool as_before = mean * 0.8 < ms && ms < mean * 1.25;
        n = std::min(n, is_plain && !as_before ? 0 : 1);
    }
    // Two of them follow each other then, and the shorter counts: a hiccup only lengthens.
    const bool second = is_plain && known.n == 1 && is_fresh(known);
    known = {second ? std::min(mean, ms) : moved(mean, ms, n), 0, clock_, std::min(n + 1, n_counted)};
    known.plain = is_fresh(plain) ? plain.ms : 0;
}

bool Costs::is_fresh(const Known & known) const {
    return static_cast<double>(clock_ - known.last) < n_fresh;
}

bool Costs::needs_plain(int32_t row) const {
    const Known & plain = rows_[row].pass[0];
    return clock_ - plain.last >= plain_every || plain.n < 2;
}

bool Costs::known(int32_t row, int32_t most, int32_t n_drafts) const {
    const Steps & steps = rows_[row];
    const auto seen = [](const Known & known) { return known.ms > 0; };
    return steps.measured >= most && std::all_of(steps.draft.begin(), steps.draft.begin() + n_drafts, seen);
}

void Costs::saw_pass(int32_t row, int32_t size, double ms) {
    ++clock_;
    Known & pass = rows_[row].pass[size];
    see(row, pass, ms);
    if (pass.plain > pass.ms) { // plain passes were held up then, which does not say what the pace was
        pass.plain = 0;
    }
}

void Costs::saw_draft(int32_t row, int32_t size, double ms) {
    see(row, rows_[row].draft[size], ms);
}

Costs::Row Costs::row(int32_t row) const {
    const auto at_pace = [&](const Known & known) { return now(row, known); };
    // No pass takes less than a plain one: that is seen most, and the other was lucky or plain passes are held up just now.
    const auto of_pass = [&](const Known & known) { return std::max(at_pace(known), plain(row)); };
    Row out;
    std::transform(rows_[row].pass.begin(), rows_[row].pass.end(), out.pass.begin(), of_pass);
    std::transform(rows_[row].draft.begin(), rows_[row].draft.end(), out.draft.begin(), at_pace);
    return out;
}

int32_t Costs::stalest(int32_t row, int32_t most, int64_t & age) const {
    const auto & pass = rows_[row].pass;
    int32_t oldest = 0;
    for (int32_t i = 1; i < n_pass_sizes && pass_sizes[i] <= most; ++i) {
        oldest = pass[i].last < pass[oldest].last ? i : oldest;
    }
    age = clock_ - pass[oldest].last;
    return oldest;
}

// Straight lines between the sizes that were measured; beyond them on along the one from a plain pass to the last.
void Costs::fill(int32_t row) {
    auto & pass = rows_[row].pass;
    const auto slope = [&](int32_t from, int32_t to) {
        return (pass[to].ms - pass[from].ms) / (pass_sizes[to] - pass_sizes[from]);
    };
    int32_t before = 0;
    for (int32_t i = 1; i < n_pass_sizes; ++i) {
        if (pass[i].n > 0) {
            before = i;
            continue;
        }
        int32_t after = i + 1;
        while (after < n_pass_sizes && pass[after].n == 0) {
            ++after;
        }
        double a_node = pass[0].ms; // where nothing else is known, each node costs as much as one alone
        if (after < n_pass_sizes) {
            a_node = slope(before, after);
        } else if (before > 0) {
            a_node = slope(0, before);
        }
        pass[i].ms = pass[before].ms + std::max(a_node, 0.0) * (pass_sizes[i] - pass_sizes[before]);
        pass[i].plain = pass[0].ms;
    }
}

// As they were seen, with the plain passes of then: at today's pace they would be taken along from pace to pace.
void Costs::save(double * out) const {
    for (const Steps & steps : rows_) {
        *out++ = steps.measured;
        for (const Known & known : steps.pass) {
            *out++ = known.ms;
            *out++ = known.plain;
            *out++ = known.n;
        }
        for (const Known & known : steps.draft) {
            *out++ = known.ms;
            *out++ = known.plain;
        }
    }
}

bool Costs::load(const double * values) {
    const auto is_time = [](double ms) { return ms >= 0 && ms < 1e9; };
    Costs read;
    read.clock_ = kept_for;
    for (Steps & steps : read.rows_) {
        const double measured = *values++;
        const bool is_known = measured > 0;
        if (!(measured >= 0 && measured <= pass_sizes.back())) {
            return false;
        }
        steps.measured = (int32_t) measured;
        for (Known & known : steps.pass) {
            known.ms = *values++;
            known.plain = *values++;
            const double n = *values++;
            if (!is_time(known.ms) || !is_time(known.plain) || (known.ms > 0) != is_known ||
                !(n >= 0 && n <= n_counted)) {
                return false;
            }
            known.n = (int32_t) n;
        }
        for (Known & known : steps.draft) {
            known.ms = *values++;
            known.plain = *values++;
            if (!is_time(known.ms) || !is_time(known.plain)) {
                return false;
            }
        }
    }
    *this = read;
    return true;
}

} // namespace pf
