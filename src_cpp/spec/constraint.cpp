#include "spec/constraint.h"

#include <algorithm>
#include <limits>

#include "error.h"

namespace pf {
namespace {

constexpr uint32_t all = 0xffffffffu;

int checked(int answer) {
    if (answer < 0) {
        throw Error(PF_ERR_STATE, "the constraint on what may be said has failed");
    }
    return answer;
}

} // namespace

Constraint::Constraint(const pf_constraint & given, int32_t n_vocab) : given_(given), n_vocab_(n_vocab) {
    require(given.mask && given.allowed && given.forced, "a constraint needs all of its functions");
    require(given.n_vocab >= 1, "a constraint's n_vocab must be at least 1");
    bits_.resize((static_cast<size_t>(std::max(n_vocab, given.n_vocab)) + 31) / 32);
}

void Constraint::mask(const int32_t * path, int32_t n, float * logits) {
    std::fill(bits_.begin(), bits_.end(), 0);
    checked(given_.mask(given_.user, path, n, bits_.data()));
    bool any = false;
    for (int32_t first = 0; first < n_vocab_; first += 32) {
        const uint32_t open = bits_[static_cast<size_t>(first) / 32];
        any |= open != 0;
        for (int32_t i = first; open != all && i < std::min(first + 32, n_vocab_); ++i) {
            logits[i] = open >> (i - first) & 1 ? logits[i] : -std::numeric_limits<float>::infinity();
        }
    }
    if (!any) {
        throw Error(PF_ERR_STATE, "the constraint allows no token at all where one is needed");
    }
}

bool Constraint::allowed(const int32_t * path, int32_t n) const {
    return path[n - 1] < given_.n_vocab && checked(given_.allowed(given_.user, path, n)) > 0;
}

const Line * Constraint::forced(int32_t n_most) {
    const int32_t n = n_most > 0 ? std::min(checked(given_.forced(given_.user, line_.token, n_most)), n_most) : 0;
    // A vocabulary can be larger than the model: what it has not cannot be proposed.
    const auto unknown = [&](int32_t id) { return id < 0 || id >= n_vocab_; };
    line_.n = static_cast<int32_t>(std::find_if(line_.token, line_.token + n, unknown) - line_.token);
    std::fill_n(line_.logp, line_.n, 0.0f);
    return line_.n > 0 ? &line_ : nullptr;
}

} // namespace pf
