// How likely the target is to choose a drafted token, given that it chose all those above it.
//
// A drafter gives every depth of its block a distribution of its own, which averages over what may stand above. Of a path
// that was accepted so far more is known: how deep it is, and how often it left the drafter's first choice. So the log-odds
// of each token are a linear function of what the drafter says and of the two, a logistic regression that begins with the
// drafter's own probabilities and is learned from every node that a verified tree visits: from the token that the target
// chose there and from all those it did not, whether they were in the tree or not.
#pragma once

#include <array>
#include <cstdint>

namespace pf {

struct Calibration {
    static constexpr int32_t n_weights = 12;
    std::array<double, n_weights> weight;

    static Calibration identity(); // the drafter's probabilities as they are

    // Log-probability of the token of this rank at a depth (1: below the root) of the drafter's block, behind a path with
    // so many tokens of other ranks than 0. own, first: the drafter's log-probabilities of it and of rank 0.
    double logp(int32_t depth, int32_t deviations, int32_t rank, float own, float first) const;
};

// Learns by one Newton step for every node visited: the mode of what is likely after it, were the log-likelihood of all
// before it the parabola that it looks like there (an assumed-density filter; Opper 1998). What is long ago fades.
class Calibrator {
  public:
    Calibrator() { clear(); }

    const Calibration & learned() const { return calibration_; }
    // What the target chose behind a path as above: a rank of the n_rank choices drafted for this depth, or -1 for none of
    // them.
    void see(int32_t depth, int32_t deviations, const float * logp, int32_t n_rank, int32_t chosen);
    void clear();

    // As numbers, to be kept.
    static constexpr int32_t n_values = Calibration::n_weights * (Calibration::n_weights + 1);
    void save(double * out) const;
    bool load(const double * values); // false, and nothing has changed: they are no calibrator's

  private:
    using Vector = std::array<double, Calibration::n_weights>;

    Calibration calibration_;
    std::array<Vector, Calibration::n_weights> precision_; // of what is known about the weights; lower triangle
};

} // namespace pf
