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

} // namespace

void Copier::clear() {
    index_.clear();
    for (int32_t i = 0; i < n_lengths * n_opinions; ++i) {
        counts_[i] = {prior[i / n_opinions][i % n_opinions] * prior_trials, prior_trials};
    }
    forget();
}

void Copier::copy(const Copier & from, const int32_t * tokens, int64_t n) {
    clear();
    std::copy_n(from.counts_, n_lengths * n_opinions, counts_);
    grow(tokens, n);
}

const Line * Copier::propose(const int32_t * tokens, int64_t n, int32_t n_most, const int32_t * ids, const float * logp,
                             int32_t n_depth, int32_t n_rank) {
    line_.n = 0;
    const Match match = index_.match(tokens);
    if (match.at < 0) {
        return nullptr;
    }
    for (int32_t i = 0; i < n_most; ++i) {
        // Where the match reaches the end of the timeline, the line goes on with itself: a loop.
        const int64_t at = match.at + 1 + i;
        line_.token[i] = at < n ? tokens[at] : line_.token[at - n];
        const int32_t opinion = opinion_column(line_.token[i], i, ids, logp, n_depth, n_rank);
        const int32_t cell = length_row(match.length + i) * n_opinions + opinion;
        const Count & count = counts_[cell];
        line_.logp[i] = std::log(std::min(count.hits / count.trials, surest));
        cell_[i] = cell;
        line_.n = i + 1;
    }
    return &line_;
}

int32_t Copier::n_right(const int32_t * said, int32_t n) const {
    const int32_t most = std::min(n, line_.n);
    return static_cast<int32_t>(std::mismatch(said, said + most, line_.token).first - said);
}

void Copier::learn(const int32_t * said, int32_t n) {
    const int32_t right = n_right(said, n);
    for (int32_t i = 0; i < std::min({right + 1, n, line_.n}); ++i) { // what follows a wrong token was never tried
        counts_[cell_[i]].trials += 1;
        counts_[cell_[i]].hits += i < right ? 1 : 0;
    }
    forget();
}

} // namespace pf
