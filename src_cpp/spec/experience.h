// What a session learns that makes it faster and never changes what it says: what steps take here, what drafts are worth,
// and how often drafts and copies prove right.
#pragma once

#include "calibration.h"
#include "copier.h"
#include "policy.h"

namespace pf {

struct Experience {
    Policy policy;
    CopyRates copying;
    Calibrator greedy;
    Calibrator sampled; // a draw follows the drafter's probabilities in another way than the likeliest token does

    // As numbers, to be kept for a later session; the first tells the layout.
    static constexpr int32_t n_values = 1 + Policy::n_values + CopyRates::n_values + 2 * Calibrator::n_values;
    void save(double * out) const;
    bool load(const double * values); // false, and nothing has changed: they are not what save wrote
};

} // namespace pf
