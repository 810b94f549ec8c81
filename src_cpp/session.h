// One timeline of tokens, and the only place that knows the order of things: prefill, and the decode step
// draft -> tree -> verify -> accept -> commit.
//
// Between calls the session stands at n committed tokens (KV rows, recurrent state, drafter ring) and at most one pending
// token: chosen, not yet evaluated, the root of the next tree. Plain decoding is a tree of one node, a chain a tree
// without branches. After an error in the middle of a pass the session is reset.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "error.h"
#include "plan.h"
#include "runner.h"
#include "spec/accept.h"
#include "spec/chooser.h"
#include "spec/constraint.h"
#include "spec/copier.h"
#include "spec/experience.h"
#include "spec/tree.h"

namespace pf {

class Session {
  public:
    Session(std::shared_ptr<const Target> target, std::shared_ptr<const Drafter> drafter,
            const pf_session_params & params);

    const Plan & plan() const { return plan_; }
    std::vector<Plan::Row> memory() const { return runner_.memory(); } // allocated, of the plan's rows
    int32_t n_ctx() const { return (int32_t) n_ctx_; }
    int64_t n_tokens() const { return (int64_t) tokens_.size(); } // n_committed, or one more
    int64_t n_committed() const { return n_; }
    void get_tokens(int64_t first, int64_t n, int32_t * out) const;
    const pf_counters & counters() const { return runner_.counters(); }

    void reset();
    void append(const int32_t * ids, uint64_t n);
    void configure(const pf_generate_params & params);
    void constrain(const pf_constraint * given); // null: everything may be said
    void step(int32_t max_tokens, pf_step_result & out);
    void commit(int32_t n_keep);
    // See pf_session_logprobs.
    void logprobs(float * logp, int32_t * top_ids, float * top_logp) const {
        chooser_.logprobs(logp, top_ids, top_logp);
    }

    // See pf_session_get_costs and pf_session_propose.
    Costs::Row costs();
    const Experience & experience() const { return experience_; }
    void set_experience(const Experience & given) {
        require_settled("set_experience");
        experience_ = given;
    }
    void propose(const int32_t * ids, int32_t n);

    // Going back, keeping and moving a timeline; what is what is in snapshot.h.
    uint64_t state_bytes(int64_t n) const; // of n committed tokens
    void get_state(void * out, uint64_t size);
    void rewind(int64_t n, const void * state, uint64_t size);
    int32_t n_kv() const;
    uint64_t kv_row_bytes(int32_t tensor) const;
    void get_kv(int32_t tensor, int64_t first, int64_t n, void * out, uint64_t size) const;
    void set_kv(int32_t tensor, int64_t first, int64_t n, const void * rows, uint64_t size);
    void restore(const int32_t * ids, int64_t n, const void * state, uint64_t size);
    void copy(Session & from);

    void logits(const int32_t * ids, uint64_t n, float * out);
    void hidden(const int32_t * ids, uint64_t n, const std::vector<int32_t> & layers, float * out);
    void draft_logits(const int32_t * ids, uint64_t n, float * out);

  private:
    template <class Read>
    void evaluate(int64_t n, PassOptions options, Read && read);
    void check_ids(const int32_t * ids, uint64_t n) const;
    void check_room(uint64_t n, int64_t n_held) const;
    void require_settled(const char * what) const;
    void require_pending(const char * what) const;
    void require_empty(const char * what) const;
    void check_kv(const char * what, int32_t tensor, int64_t first, int64_t n, int64_t n_rows, uint64_t size) const;
    void check_state(const char * what, const int32_t * ids, int64_t n, const void * state, uint64_t size) const;
    int32_t pending() const { return tokens_.back(); } // where there is one
    void reset_on_error(const std::function<void()> & body, const std::function<bool(const Error &)> & stands = {});
    const std::vector<int32_t> * taps() const { return drafter_ ? &drafter_->taps : nullptr; }
    // With a fixed budget a run is the same whatever was learned before, to the last bit.
    CopyRates & copy_rates() { return searches_ ? experience_.copying : fixed_rates_; }
    Calibrator & calibrator() { return sampled_ ? experience_.sampled : experience_.greedy; }

    // What was drafted in this step: the upper n_depth of n_drafted depths, n_rank choices each; 0: nothing.
    struct Block {
        int32_t n_depth = 0, n_drafted = 0, n_rank = 1;
    };
    Block new_block() const;
    void draft(Block & block, int32_t n_depth);
    const Line * given_line(int32_t n_most);
    const Line * copied_line(const Block & block, int32_t n_most);
    void grow_tree(const Block & block, int32_t budget);
    void search_tree(Block & block, int32_t n_depth, int32_t n_line);
    void learn(const Block & block);
    int32_t n_drafts() const;
    void measure_costs();
    void get_ready_to_search();
    template <class Run>
    double time_of(Run && run);
    double time_pass(int32_t n_nodes);

    std::shared_ptr<const Target> target_;
    std::shared_ptr<const Drafter> drafter_; // null: plain decoding
    Plan plan_;
    int64_t n_ctx_;
    int32_t n_batch_;
    Runner runner_;
    Chooser chooser_;
    Copier copier_;
    Experience experience_;
    CopyRates fixed_rates_; // of this timeline
    std::optional<Constraint> constraint_;

    std::vector<int32_t> tokens_; // the timeline: the committed tokens, then the pending one if there is one
    int64_t n_ = 0;               // committed tokens
    int32_t budget_ = 0;          // at most so many nodes besides the root
    bool searches_ = false;       // each step's number is the policy's to choose
    bool sampled_ = false;
    int32_t shape_ = PF_SHAPE_TREE;
    bool copying_ = true;
    std::vector<int32_t> stop_ids_;

    Tree tree_; // of the last step
    Accepted accepted_;
    bool uncommitted_ = false;
    struct Spent {
        double context_ms, draft_ms, pass_ms;
        uint64_t graphs_built; // by its beginning
    } spent_ = {};             // in it

    Line proposed_;                // for the next step; none when it has no tokens
    const Line * line_ = nullptr;  // of the step's tree
    Nodes nodes_;                  // work memory, sized once
    std::vector<int32_t> top_ids_; // [n_depth, n_rank], what was drafted
    std::vector<float> top_logp_;
    std::vector<int32_t> choice_; // [N, 2], greedy: the likeliest token at each node, and its log-probability's bits
    std::vector<float> logits_;   // [n_vocab], once choosing has read them: of the node being visited
};

} // namespace pf
