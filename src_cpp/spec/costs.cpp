#include "spec/costs.h"

#include <algorithm>
#include <cmath>

namespace pf {
namespace {

constexpr int32_t n_counted = 16; // passes that a mean looks back on

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

void Costs::saw_pass(int32_t row, int32_t size, double ms) {
    double & mean = rows_[row].pass[size];
    int32_t & n = times_[row][size];
    mean = moved(mean, ms, n);
    n = std::min(n + 1, n_counted);
    last_[row][size] = ++clock_;
}

void Costs::saw_draft(int32_t row, int32_t size, double ms) {
    double & mean = rows_[row].draft[size];
    mean = moved(mean, ms, mean > 0 ? n_counted : 0);
}

int32_t Costs::stalest(int32_t row, int32_t most, int64_t & age) const {
    const auto & last = last_[row];
    int32_t oldest = 0;
    for (int32_t i = 1; i < n_pass_sizes && pass_sizes[i] <= most; ++i) {
        oldest = last[i] < last[oldest] ? i : oldest;
    }
    age = clock_ - last[oldest];
    return oldest;
}

// Straight lines between the sizes that were measured; beyond them on along the last.
void Costs::fill(int32_t row) {
    auto & pass = rows_[row].pass;
    int32_t before = 0;
    for (int32_t i = 1; i < n_pass_sizes; ++i) {
        if (times_[row][i] > 0) {
            before = i;
            continue;
        }
        int32_t after = i + 1;
        while (after < n_pass_sizes && times_[row][after] == 0) {
            ++after;
        }
        double slope = pass[0]; // where nothing else is known, each node costs as much as one alone
        if (after < n_pass_sizes) {
            slope = (pass[after] - pass[before]) / (pass_sizes[after] - pass_sizes[before]);
        } else if (before > 0) {
            slope = (pass[before] - pass[0]) / (pass_sizes[before] - 1);
        }
        pass[i] = pass[before] + std::max(slope, 0.0) * (pass_sizes[i] - pass_sizes[before]);
    }
}

void Costs::save(double * out) const {
    for (int32_t row = 0; row < n_rows; ++row) {
        out = std::copy(rows_[row].pass.begin(), rows_[row].pass.end(), out);
        out = std::copy(times_[row].begin(), times_[row].end(), out);
        out = std::copy(rows_[row].draft.begin(), rows_[row].draft.end(), out);
    }
}

bool Costs::load(const double * values) {
    Costs read;
    for (int32_t row = 0; row < n_rows; ++row) {
        for (double & ms : read.rows_[row].pass) {
            ms = *values++;
        }
        for (int32_t & n : read.times_[row]) {
            const double given = *values++;
            if (!(given >= 0 && given <= n_counted)) {
                return false;
            }
            n = (int32_t) given;
        }
        for (double & ms : read.rows_[row].draft) {
            ms = *values++;
        }
        const auto & [pass, draft] = read.rows_[row];
        const auto is_time = [](double ms) { return ms >= 0 && ms < 1e9; };
        if (!std::all_of(pass.begin(), pass.end(), is_time) || !std::all_of(draft.begin(), draft.end(), is_time) ||
            (pass[0] > 0) != std::all_of(pass.begin(), pass.end(), [](double ms) { return ms > 0; })) {
            return false;
        }
    }
    *this = read;
    return true;
}

} // namespace pf
