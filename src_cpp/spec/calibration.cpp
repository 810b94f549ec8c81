#include "spec/calibration.h"

#include <algorithm>
#include <cmath>

namespace pf {
namespace {

constexpr int32_t n_weights = Calibration::n_weights;
using Vector = std::array<double, n_weights>;
using Matrix = std::array<Vector, n_weights>;

constexpr double prior_precision = 8; // how much the first nodes have to say against the drafter's own probabilities
constexpr double memory = 4000;       // nodes
constexpr int32_t n_looked_at = 24;   // ranks of a node
constexpr double farthest = 30;       // a weight that anything sensible leads to is smaller

// log(1 - exp(x)) for x < 0
double log_rest(double x) {
    return std::log(-std::expm1(x));
}

// A float's log-softmax rounds to 0 or a hair above where it should be just below.
double below_zero(float logp) {
    return std::min(static_cast<double>(logp), -1e-4);
}

Vector features(int32_t depth, int32_t deviations, int32_t rank, float own, float first) {
    const double logp = below_zero(own);
    const double odds = logp - log_rest(logp);
    const double is_first = rank == 0 ? 1 : 0;
    const double is_deep = depth > 1 ? 1 : 0;
    const double log_depth = std::log(static_cast<double>(depth));
    const double log_left = std::log1p(static_cast<double>(std::min(deviations, 3)));
    return {1,
            odds,
            is_first,
            is_first * odds,
            std::log1p(static_cast<double>(rank)),
            rank == 0 ? 0 : log_rest(below_zero(first)),
            is_deep,
            log_depth,
            log_depth * odds,
            log_left,
            log_left * odds,
            log_left * is_first};
}

double dot(const Vector & a, const Vector & b) {
    double sum = 0;
    for (int32_t i = 0; i < n_weights; ++i) {
        sum += a[i] * b[i];
    }
    return sum;
}

// x of a x = b, a symmetric and positive definite, given by its lower triangle; false when it is not.
bool solve(Matrix a, Vector b, Vector & x) {
    for (int32_t i = 0; i < n_weights; ++i) { // Cholesky, in place
        for (int32_t j = 0; j <= i; ++j) {
            double sum = a[i][j];
            for (int32_t k = 0; k < j; ++k) {
                sum -= a[i][k] * a[j][k];
            }
            if (i == j && !(sum > 0)) {
                return false;
            }
            a[i][j] = i == j ? std::sqrt(sum) : sum / a[j][j];
        }
        for (int32_t k = 0; k < i; ++k) {
            b[i] -= a[i][k] * b[k];
        }
        b[i] /= a[i][i];
    }
    for (int32_t i = n_weights - 1; i >= 0; --i) {
        x[i] = b[i];
        for (int32_t k = i + 1; k < n_weights; ++k) {
            x[i] -= a[k][i] * x[k];
        }
        x[i] /= a[i][i];
    }
    return true;
}

Vector prior_mean() {
    Vector mean = {};
    mean[1] = 1;
    return mean;
}

} // namespace

Calibration Calibration::identity() {
    return {prior_mean()};
}

double Calibration::logp(int32_t depth, int32_t deviations, int32_t rank, float own, float first) const {
    const double z = dot(weight, features(depth, deviations, rank, own, first));
    return z < 0 ? z - std::log1p(std::exp(z)) : -std::log1p(std::exp(-z));
}

void Calibrator::clear() {
    calibration_ = Calibration::identity();
    for (int32_t i = 0; i < n_weights; ++i) {
        precision_[i] = {};
        precision_[i][i] = prior_precision;
    }
}

void Calibrator::see(int32_t depth, int32_t deviations, const float * logp, int32_t n_rank, int32_t chosen) {
    // What is known fades to what was before anything was.
    constexpr double kept = 1 - 1 / memory;
    const Vector prior = prior_mean();
    Matrix precision = precision_;
    Vector gradient = {};
    for (int32_t i = 0; i < n_weights; ++i) {
        for (int32_t j = 0; j <= i; ++j) {
            precision[i][j] *= kept;
        }
        precision[i][i] += (1 - kept) * prior_precision;
        gradient[i] = (1 - kept) * prior_precision * (prior[i] - calibration_.weight[i]);
    }
    for (int32_t rank = 0; rank < std::min(n_rank, n_looked_at); ++rank) {
        const Vector x = features(depth, deviations, rank, logp[rank], logp[0]);
        const double p = 1 / (1 + std::exp(-dot(calibration_.weight, x)));
        const double error = (rank == chosen ? 1 : 0) - p;
        const double curvature = p * (1 - p);
        for (int32_t i = 0; i < n_weights; ++i) {
            gradient[i] += error * x[i];
            for (int32_t j = 0; j <= i; ++j) {
                precision[i][j] += curvature * x[i] * x[j];
            }
        }
    }
    Vector step;
    if (!solve(precision, gradient, step)) {
        return clear();
    }
    precision_ = precision;
    for (int32_t i = 0; i < n_weights; ++i) {
        calibration_.weight[i] = std::clamp(calibration_.weight[i] + step[i], -farthest, farthest);
    }
}

void Calibrator::save(double * out) const {
    out = std::copy(calibration_.weight.begin(), calibration_.weight.end(), out);
    for (const Vector & row : precision_) {
        out = std::copy(row.begin(), row.end(), out);
    }
}

bool Calibrator::load(const double * values) {
    Calibrator read;
    std::copy_n(values, n_weights, read.calibration_.weight.begin());
    for (int32_t i = 0; i < n_weights; ++i) {
        std::copy_n(values + (i + 1) * n_weights, n_weights, read.precision_[i].begin());
    }
    for (int32_t i = 0; i < n_weights; ++i) {
        if (!(std::abs(read.calibration_.weight[i]) <= farthest)) {
            return false;
        }
    }
    Vector unused;
    if (!solve(read.precision_, {}, unused)) {
        return false;
    }
    *this = read;
    return true;
}

} // namespace pf
