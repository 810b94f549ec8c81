// One timeline of tokens, and the only place that knows the order of things: prefill, and the decode step
// draft -> tree -> verify -> accept -> commit.
//
// Between calls the session stands at n committed tokens (KV rows, recurrent state, drafter ring) and one pending token:
// chosen, not yet evaluated, the root of the next tree. Plain decoding is a tree of one node, a chain a tree without
// branches. After an error in the middle of a pass the session is reset.
#pragma once

#include <memory>
#include <vector>

#include "plan.h"
#include "runner.h"
#include "spec/accept.h"
#include "spec/chooser.h"
#include "spec/tree.h"

namespace pf {

class Session {
  public:
    Session(std::shared_ptr<const Target> target, std::shared_ptr<const Drafter> drafter,
            const pf_session_params & params);

    const Plan & plan() const { return plan_; }
    std::vector<Plan::Row> memory() const { return runner_.memory(); } // allocated, of the plan's rows
    int32_t n_ctx() const { return (int32_t) n_ctx_; }
    int64_t n_tokens() const { return n_ + (pending_ >= 0 ? 1 : 0); }
    const pf_counters & counters() const { return runner_.counters(); }

    void reset();
    void append(const int32_t * ids, uint64_t n);
    void configure(const pf_generate_params & params);
    void step(int32_t max_tokens, pf_step_result & out);
    void commit(int32_t n_keep);
    // See pf_session_logprobs.
    void logprobs(float * logp, int32_t * top_ids, float * top_logp) const {
        chooser_.logprobs(logp, top_ids, top_logp);
    }

    void logits(const int32_t * ids, uint64_t n, float * out);
    void hidden(const int32_t * ids, uint64_t n, const std::vector<int32_t> & layers, float * out);
    void draft_logits(const int32_t * ids, uint64_t n, float * out);

  private:
    template <class Read>
    void evaluate(const int32_t * ids, uint64_t n, PassOptions options, Read && read);
    void check_ids(const int32_t * ids, uint64_t n) const;
    void check_room(uint64_t n) const;
    void require_settled(const char * what) const;
    template <class Body>
    void reset_on_error(Body && body);
    const std::vector<int32_t> * taps() const { return drafter_ ? &drafter_->taps : nullptr; }

    std::shared_ptr<const Target> target_;
    std::shared_ptr<const Drafter> drafter_; // null: plain decoding
    Plan plan_;
    int64_t n_ctx_;
    int32_t n_batch_;
    Runner runner_;
    Chooser chooser_;

    int64_t n_ = 0;        // committed tokens
    int32_t pending_ = -1; // chosen, not yet evaluated; -1: the timeline is empty
    int32_t budget_ = 0;
    int32_t shape_ = PF_SHAPE_TREE;
    std::vector<int32_t> stop_ids_;

    Tree tree_; // of the last step
    Accepted accepted_;
    bool uncommitted_ = false;

    Nodes nodes_;                  // work memory, sized once
    std::vector<int32_t> top_ids_; // [n_depth, n_rank], what was drafted
    std::vector<float> top_logp_;
    std::vector<int32_t> choice_; // [N, 2], greedy: the likeliest token at each node
    std::vector<float> logits_;   // [n_vocab], where choosing reads them: of the node being visited
};

} // namespace pf
