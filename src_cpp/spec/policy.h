// How much to draft and to verify in each step: what gives the most tokens a second.
//
// Over many steps that is a matter of prices. Time could always be spent on steps as they have been lately, so a
// millisecond is worth the tokens that it gave lately (at least those of plain decoding), and each choice is made for the
// most tokens expected less the price of its time: the average-reward rule of renewal processes. A draft is paid for before
// its probabilities are seen; whether to draft, and how deep, goes by what drafts of each size were worth lately, which every
// deeper draft tells too. Where another was worth more, or none its time, a full one is made now and then all the same, for a
// hundredth of the time that passes, and where the target is surer than usual: what is easy for it is easy for its
// drafter. What drafts give beyond their time is booked: when it is used up, those made to look are the only ones until they
// have paid it back. So text that offers nothing costs little however often it seems to.
#pragma once

#include "costs.h"
#include "tree.h"

namespace pf {

class Policy {
  public:
    Costs costs;

    // A step at n tokens begins; costs.known(row(), ...) must hold from here on.
    void begin(int64_t n);
    int32_t row() const { return row_; }
    // A size of at most so many nodes that may be measured again out of the time set aside, because it has long not been
    // used; else -1.
    int32_t to_measure(int32_t most);

    struct Choice {
        int32_t n_nodes = 1; // of the tree's likeliest, the root included
        double value = 0;    // tokens, less the price of the pass
    };
    // The best pass over the likeliest nodes of a tree, of at most so many with pads; of nodes this deep and no deeper.
    Choice choose(const Tree & tree, int32_t most, int32_t max_depth = PF_MAX_NODES) const;
    // The size of draft to make, of the first n_sizes; -1: none. proposed: there is a line of tokens from elsewhere
    // already; drafts beside one are always full.
    int32_t drafts(bool proposed, int32_t n_sizes);
    // A draft of this size was made: the best that could have been done without, and the tree that there is now. Gives the
    // best of that.
    Choice drafted(int32_t size, bool proposed, const Choice & without, const Tree & tree, int32_t most);
    // Time that drafting took besides, for what had waited until then.
    void paid(double ms) { spare_ms_ = std::max(0.0, spare_ms_ - ms); }
    // The target's likeliest token behind what was pending had this log-probability.
    void saw_target(double logp);
    // The step gave so many tokens in so many milliseconds. n_nodes: of its pass with pads. typical: it did nothing that
    // others do not, such as building a graph.
    void finished(int32_t n_tokens, int32_t n_nodes, double draft_ms, double pass_ms, bool typical);

    static constexpr int32_t n_values = Costs::n_values + 2 * (n_draft_sizes + 1);
    void save(double * out) const;
    bool load(const double * values); // false, and nothing has changed: they are no policy's

  private:
    double price() const;                                 // tokens a millisecond
    using DraftCosts = std::array<double, n_draft_sizes>; // milliseconds
    DraftCosts draft_costs() const;

    int32_t row_ = 0;
    int32_t drafted_ = 0;             // size of the step's draft
    double tokens_ = 0, ms_ = 0;      // of the last steps, fading
    double behind_ms_ = 0;            // what a pass takes more behind a draft than without
    int64_t n_targets_ = 0;           // passes of which was seen
    double lately_ = 0, usually_ = 0; // how likely the target's likeliest token was
    double spare_ms_ = 0;             // for drafts that teach more than they give
    double unmeasured_ms_ = 0;        // since a pass was run to be measured
    double credit_ms_ = 0;            // what drafts gave lately beyond their time

    // What a draft adds to a step, in tokens: of each size where nothing else was proposed, and of a full one where
    // something was.
    struct Gain {
        double mean = 0;
        bool known = false;
        int32_t tokens_since = 0; // said since it was last seen

        void saw(double tokens);
    } gain_[n_draft_sizes + 1];
};

} // namespace pf
