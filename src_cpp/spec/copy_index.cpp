#include "spec/copy_index.h"

#include <algorithm>

namespace pf {

CopyIndex::CopyIndex(int64_t n_ctx) {
    int32_t bits = 10;
    while (bits < 31 && (int64_t{1} << bits) < n_ctx) {
        ++bits;
    }
    shift_ = 32 - bits;
    latest_.resize(size_t{1} << bits);
    previous_.resize(static_cast<size_t>(n_ctx));
}

void CopyIndex::clear() {
    std::fill(latest_.begin(), latest_.end(), 0);
    n_ = 0;
    held_ = {};
}

// Of the n-gram that ends at position `last`.
uint32_t CopyIndex::slot(const int32_t * tokens, int64_t last) const {
    uint32_t hash = 0;
    for (int64_t at = last - n_gram + 1; at <= last; ++at) {
        hash = (hash ^ static_cast<uint32_t>(tokens[at])) * 0x9E3779B1u; // 2^32 over the golden ratio, made odd
        hash ^= hash >> 15;                                              // the high bits know more than the low ones
    }
    return (hash * 0x9E3779B1u) >> shift_;
}

void CopyIndex::grow(const int32_t * tokens, int64_t n) {
    for (; n_ < n; ++n_) {
        if (n_ + 1 >= n_gram) {
            int32_t & latest = latest_[slot(tokens, n_)];
            previous_[static_cast<size_t>(n_)] = latest;
            latest = static_cast<int32_t>(n_ + 1);
        }
    }
}

void CopyIndex::shrink(const int32_t * tokens, int64_t n) {
    while (n_ > n) { // the last to come is the latest of its chain
        --n_;
        if (n_ + 1 >= n_gram) {
            latest_[slot(tokens, n_)] = previous_[static_cast<size_t>(n_)];
        }
    }
    held_ = {};
}

// Of the match of the timeline's end with what ends at `at`.
int32_t CopyIndex::length(const int32_t * tokens, int64_t at) const {
    const int64_t last = n_ - 1;
    const int64_t most = std::min<int64_t>(at + 1, max_length);
    int32_t n = 0;
    while (n < most && tokens[at - n] == tokens[last - n]) {
        ++n;
    }
    return n;
}

Match CopyIndex::match(const int32_t * tokens) {
    Match best;
    const auto look = [&](int64_t at) {
        const int32_t n = length(tokens, at);
        if (n >= n_gram && n > best.length) {
            best = {at, n};
        }
    };
    if (n_ >= n_gram) {
        int64_t at = previous_[static_cast<size_t>(n_ - 1)] - 1;
        for (int32_t links = 0; at >= 0 && links < max_links && best.length < max_length; ++links) {
            look(at);
            at = previous_[static_cast<size_t>(at)] - 1;
        }
        if (held_.at >= 0) {
            look(held_.at + n_ - held_n_);
        }
    }
    held_ = best;
    held_n_ = n_;
    return best;
}

} // namespace pf
