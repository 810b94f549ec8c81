// How often each token stands on the timeline, and in the output alone: what was said since the last append. Kept up to
// date token by token; penalties and nothing else look at it.
#pragma once

#include <cstdint>
#include <vector>

namespace pf {

class TokenCounts {
  public:
    explicit TokenCounts(int32_t n_vocab) : of_(static_cast<size_t>(n_vocab)) {}

    struct Count {
        int32_t timeline = 0;
        int32_t output = 0;
    };
    Count of(int32_t token) const { return of_[static_cast<size_t>(token)]; }
    // The tokens of the timeline, each once, in the order of their first occurrence.
    const std::vector<int32_t> & distinct() const { return distinct_; }

    void clear() {
        for (const int32_t token : distinct_) {
            of_[static_cast<size_t>(token)] = {};
        }
        distinct_.clear();
    }

    // Tokens that were given. The output begins anew behind them.
    void append(const int32_t * ids, uint64_t n) {
        for (uint64_t i = 0; i < n; ++i) {
            add(ids[i]);
        }
        for (const int32_t token : distinct_) {
            of_[static_cast<size_t>(token)].output = 0;
        }
    }

    // The timeline is now these, all of them given.
    void rebuild(const int32_t * ids, uint64_t n) {
        clear();
        append(ids, n);
    }

    void say(int32_t token) { ++add(token).output; }

    // Takes back what was said, the last first: a token that has gone altogether was then the last new one.
    void unsay(int32_t token) {
        Count & count = of_[static_cast<size_t>(token)];
        --count.output;
        if (--count.timeline == 0) {
            distinct_.pop_back();
        }
    }

  private:
    Count & add(int32_t token) {
        Count & count = of_[static_cast<size_t>(token)];
        if (count.timeline++ == 0) {
            distinct_.push_back(token);
        }
        return count;
    }

    std::vector<Count> of_; // [n_vocab]
    std::vector<int32_t> distinct_;
};

} // namespace pf
