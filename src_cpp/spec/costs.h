// What steps take on this machine, in milliseconds: a pass over so many nodes, and a draft of so many depths, for every
// doubling of the context. Measured, then kept up to date by the steps themselves, whose passes have a commit behind them.
//
// Passes come in a few sizes, each searched on its own: what a pass takes rises in steps, where matrix products work in
// tiles, and no curve is assumed of what was seen. Machines change their pace: what is not seen for a while goes along
// with plain passes.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

namespace pf {

constexpr std::array<int32_t, 12> pass_sizes = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64};
constexpr int32_t n_pass_sizes = static_cast<int32_t>(pass_sizes.size());

// The smallest of rising sizes that holds so many, else the largest.
template <size_t n_sizes>
int32_t size_of(const std::array<int32_t, n_sizes> & sizes, int32_t n) {
    return static_cast<int32_t>(std::lower_bound(sizes.begin(), sizes.end() - 1, n) - sizes.begin());
}
inline int32_t pass_size_of(int32_t n_nodes) {
    return size_of(pass_sizes, n_nodes);
}

// Depths that a draft is asked for: a block is computed whole, but what is not asked for needs no logits. The last stands
// for all that the block has.
constexpr std::array<int32_t, 3> draft_sizes = {3, 7, 63};
constexpr int32_t n_draft_sizes = static_cast<int32_t>(draft_sizes.size());

inline int32_t draft_size_of(int32_t n_depth) {
    return size_of(draft_sizes, n_depth);
}

class Costs {
  public:
    struct Row {
        std::array<double, n_pass_sizes> pass = {}; // 0: not known
        std::array<double, n_draft_sizes> draft = {};
    };

    // The row of a context of n tokens; filled by measure().
    static int32_t row_of(int64_t n);
    bool known(int32_t row, int32_t most, int32_t n_drafts) const; // as measure() would have it
    Row row(int32_t row) const;
    double plain(int32_t row) const { return rows_[row].pass[0].ms; }
    // Whether the next pass should be a plain one: too long ago was the last, the yardstick of all.
    bool needs_plain(int32_t row) const;

    // time_pass(n_nodes) and time_draft(size) run one, of at most so many nodes, and give its time without the building of
    // a graph. n_drafts: of how many sizes there are drafts.
    // That stops after about 20 plain steps and 0.2 s; what is left then is drawn through what was measured, and gives way to
    // the first step of its size.
    template <class TimePass, class TimeDraft>
    void measure(int32_t row, int32_t most, int32_t n_drafts, TimePass && time_pass, TimeDraft && time_draft);

    // A step, or a pass for the sake of measuring, of this size (an index into pass_sizes); a draft.
    void saw_pass(int32_t row, int32_t size, double ms);
    void saw_draft(int32_t row, int32_t size, double ms);
    // Of the sizes up to `most` nodes, the one that has gone longest without being seen, and for how many passes.
    int32_t stalest(int32_t row, int32_t most, int64_t & age) const;

    static constexpr int32_t n_rows = 10; // up to 1,024 tokens, 2,048, ...
    static constexpr int32_t n_values = n_rows * (1 + 3 * n_pass_sizes + 2 * n_draft_sizes);
    void save(double * out) const;
    bool load(const double * values); // false, and nothing has changed: they are no costs

  private:
    struct Known {
        double ms = 0;    // a mean
        double plain = 0; // what a plain pass took when it was last seen; 0: that was not known
        int64_t last = 0; // pass it was last seen in
        int32_t n = 0;    // times seen, up to what counts
    };
    struct Steps {
        std::array<Known, n_pass_sizes> pass;
        std::array<Known, n_draft_sizes> draft;
        int32_t measured = 0; // passes of at most so many nodes
    };
    double now(int32_t row, const Known & known) const;
    bool is_fresh(const Known & known) const;
    void see(int32_t row, Known & known, double ms);
    void fill(int32_t row);

    std::array<Steps, n_rows> rows_;
    int64_t clock_ = 0; // passes
};

template <class TimePass, class TimeDraft>
void Costs::measure(int32_t row, int32_t most, int32_t n_drafts, TimePass && time_pass, TimeDraft && time_draft) {
    rows_[row] = {};
    double spent = 0;
    const auto twice = [&](const auto & time) { // and where the two disagree, a third decides: one of them was a hiccup
        double low = time(), high = time();
        if (low > high) {
            std::swap(low, high);
        }
        spent += low + high;
        if (high < 1.25 * low) {
            return (low + high) / 2;
        }
        const double third = time();
        spent += third;
        return std::clamp(third, low, high);
    };
    try {
        const double plain = twice([&] { return time_pass(1); });
        saw_pass(row, 0, plain);
        spent = 0;
        for (int32_t size = 0; size < n_drafts; ++size) {
            saw_draft(row, size, twice([&] { return time_draft(size); }));
        }
        for (const int32_t n_nodes : {16, 4, 2, 8, 3, 32, 6, 12, 64, 24, 48}) {
            if (spent < 20 * plain + 200 && n_nodes <= most) {
                saw_pass(row, pass_size_of(n_nodes), twice([&] { return time_pass(n_nodes); }));
            }
        }
    } catch (...) {
        rows_[row] = {};
        throw;
    }
    fill(row);
    rows_[row].measured = most;
}

} // namespace pf
