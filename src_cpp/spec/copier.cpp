#include "spec/copier.h"

#include <algorithm>
#include <cmath>

namespace pf {
namespace {

// The row of a match that has so many tokens.
int32_t length_row(int32_t length) {
    return length <= 4 ? 0 : length <= 7 ? 1 : length <= 15 ? 2 : length <= 31 ? 3 : 4;
}

// The column of what the drafter says of a token: nothing, below its block; not among its choices; or its probability.
int32_t opinion_column(int32_t token, int32_t d, const int32_t * ids, const float * logp, int32_t n_depth,
                       int32_t n_rank) {
    if (d >= n_depth) {
        return 0;
    }
    const size_t row = static_cast<size_t>(d) * n_rank;
    const int32_t rank = rank_of(token, ids + row, n_rank);
    if (rank < 0) {
        return 1;
    }
    const float p = std::exp(logp[row + rank]);
    return p <= 0.05f ? 2 : p <= 0.25f ? 3 : p <= 0.6f ? 4 : 5;
}

// Rates measured with the pair that ships, over continuations of ordinary prompts and of prompts that it quotes, rounded.
constexpr float prior[5][6] = {
    {0.50f, 0.05f, 0.10f, 0.50f, 0.65f, 0.96f}, // 3 and 4 tokens match
    {0.50f, 0.10f, 0.30f, 0.60f, 0.80f, 0.98f}, // 5 to 7
    {0.70f, 0.40f, 0.50f, 0.75f, 0.90f, 0.98f}, // 8 to 15
    {0.90f, 0.70f, 0.80f, 0.90f, 0.93f, 0.99f}, // 16 to 31
    {0.98f, 0.75f, 0.85f, 0.92f, 0.96f, 0.99f}, // more
};
constexpr float prior_trials = 4;
constexpr float surest = 0.999f; // of 1, the tree would leave nothing to the drafter's own choices

constexpr float memory = 100; // trials of a cell

} // namespace

CopyRates::CopyRates() {
    for (int32_t i = 0; i < n_lengths * n_opinions; ++i) {
        counts_[i] = {prior[i / n_opinions][i % n_opinions] * prior_trials, prior_trials};
    }
}

int32_t CopyRates::cell(int32_t match, int32_t token, int32_t d, const int32_t * ids, const float * logp,
                        int32_t n_depth, int32_t n_rank) {
    return length_row(match) * n_opinions + opinion_column(token, d, ids, logp, n_depth, n_rank);
}

float CopyRates::logp(int32_t cell) const {
    return std::log(std::min(counts_[cell].hits / counts_[cell].trials, surest));
}

void CopyRates::see(int32_t cell, bool right) {
    Count & count = counts_[cell];
    if (count.trials > memory) {
        count = {count.hits / 2, count.trials / 2};
    }
    count.trials += 1;
    count.hits += right ? 1 : 0;
}

void CopyRates::save(double * out) const {
    for (const Count & count : counts_) {
        *out++ = count.hits;
        *out++ = count.trials;
    }
}

bool CopyRates::load(const double * values) {
    CopyRates read;
    for (Count & count : read.counts_) {
        const double hits = *values++, trials = *values++;
        if (!(trials >= 1 && trials <= 2 * memory && hits > 0 && hits <= trials)) {
            return false;
        }
        count = {(float) hits, (float) trials};
    }
    *this = read;
    return true;
}

void Copier::clear() {
    index_.clear();
    forget();
}

const Line * Copier::propose(const CopyRates & rates, const int32_t * tokens, int64_t n, int32_t n_most,
                             const int32_t * ids, const float * logp, int32_t n_depth, int32_t n_rank) {
    line_.n = 0;
    const Match match = index_.match(tokens);
    if (match.at < 0) {
        return nullptr;
    }
    for (int32_t i = 0; i < n_most; ++i) {
        // Where the match reaches the end of the timeline, the line goes on with itself: a loop.
        const int64_t at = match.at + 1 + i;
        line_.token[i] = at < n ? tokens[at] : line_.token[at - n];
        cell_[i] = CopyRates::cell(match.length + i, line_.token[i], i, ids, logp, n_depth, n_rank);
        line_.logp[i] = rates.logp(cell_[i]);
        line_.n = i + 1;
    }
    return &line_;
}

int32_t Copier::n_right(const int32_t * said, int32_t n) const {
    const int32_t most = std::min(n, line_.n);
    return static_cast<int32_t>(std::mismatch(said, said + most, line_.token).first - said);
}

void Copier::learn(const int32_t * said, int32_t n, CopyRates & rates) {
    const int32_t right = n_right(said, n);
    for (int32_t i = 0; i < std::min({right + 1, n, line_.n}); ++i) { // what follows a wrong token was never tried
        rates.see(cell_[i], i < right);
    }
    forget();
}

} // namespace pf
