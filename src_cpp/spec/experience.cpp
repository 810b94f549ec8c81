#include "spec/experience.h"

namespace pf {

namespace {

constexpr double layout = 4; // goes up with every change of what the numbers mean

}

void Experience::save(double * out) const {
    *out++ = layout;
    policy.save(out);
    copying.save(out += Policy::n_values);
    greedy.save(out += CopyRates::n_values);
    sampled.save(out += Calibrator::n_values);
}

bool Experience::load(const double * values) {
    Experience read;
    if (*values++ != layout || !read.policy.load(values) || !read.copying.load(values += Policy::n_values) ||
        !read.greedy.load(values += CopyRates::n_values) || !read.sampled.load(values += Calibrator::n_values)) {
        return false;
    }
    *this = read;
    return true;
}

} // namespace pf
