// How a session spends a step's time where its budget is left open: what passes and drafts take, and the tree that is worth
// most for it. What is best is the policy's to say.
#include <algorithm>

#include "error.h"
#include "session.h"
#include "timer.h"

namespace pf {

// The tree that is worth most, and a draft for it if that is worth its time.
void Session::search_tree(Block & block, int32_t n_depth, int32_t n_line) {
    Policy & policy = experience_.policy;
    if (policy.costs.needs_plain(policy.row())) {
        n_depth = n_line = 0;
    }
    const Line * const given = given_line(n_line);
    line_ = given ? given : copied_line(block, n_line);
    grow_tree(block, line_ ? budget_ : 0);
    const bool proposed = line_ != nullptr;
    Policy::Choice choice = policy.choose(tree_, budget_ + 1);
    const int32_t size = n_depth > 0 ? policy.drafts(proposed, n_drafts()) : -1;
    if (size >= 0) {
        Timer timer;
        runner_.settle_context();
        spent_.context_ms = timer.lap_ms();
        policy.paid(spent_.context_ms);
        block.n_drafted = std::min(block.n_drafted, draft_sizes[(size_t) size]);
        draft(block, std::min(n_depth, block.n_drafted));
        spent_.draft_ms = timer.lap_ms();
        line_ = given ? given : copied_line(block, n_line); // the block has a say in how likely it is
        grow_tree(block, budget_);
        choice = policy.drafted(size, proposed, choice, tree_, budget_ + 1);
    }
    if (choice.n_nodes < tree_.n_nodes) {
        cut_tree(choice.n_nodes, tree_);
    }
}

// How many sizes of drafts there are for the block.
int32_t Session::n_drafts() const {
    const int32_t n_drafted = new_block().n_drafted;
    return n_drafted > 0 ? draft_size_of(n_drafted) + 1 : 0;
}

// Milliseconds of what a pass or a draft does; where that had to build a graph, of doing it again.
template <class Run>
double Session::time_of(Run && run) {
    const uint64_t n_built = runner_.counters().graphs_built;
    Timer timer;
    run();
    if (runner_.counters().graphs_built != n_built) {
        run(); // in which a backend may record it
        timer.lap_ms();
        run();
    }
    return timer.lap_ms();
}

// One pass over so many nodes that nothing comes of: what it leaves behind the committed rows is as if it had not been.
double Session::time_pass(int32_t n_nodes) {
    nodes_.n = nodes_.n_real = n_nodes;
    for (int32_t i = 0; i < n_nodes; ++i) {
        nodes_.set(i, pending(), i - 1, i);
    }
    PassOptions options;
    options.head = chooser_.reads_logits() || constraint_ ? PassHead::logits : PassHead::choice;
    options.taps = taps();
    return time_of([&] { runner_.pass(nodes_, n_, options); });
}

void Session::measure_costs() {
    Policy & policy = experience_.policy;
    policy.begin(n_);
    if (policy.costs.known(policy.row(), budget_ + 1, n_drafts())) {
        return;
    }
    const auto time_draft = [&](int32_t size) {
        Block block = new_block();
        block.n_drafted = std::min(block.n_drafted, draft_sizes[(size_t) size]);
        runner_.settle_context();
        return time_of([&] { draft(block, block.n_drafted); });
    };
    policy.costs.measure(
        policy.row(), budget_ + 1, n_drafts(), [&](int32_t n_nodes) { return time_pass(n_nodes); }, time_draft);
}

void Session::get_ready_to_search() {
    measure_costs();
    Policy & policy = experience_.policy;
    const int32_t size = policy.to_measure(budget_ + 1);
    if (size >= 0) {
        policy.costs.saw_pass(policy.row(), size, time_pass(pass_sizes[(size_t) size]));
    }
}

Costs::Row Session::costs() {
    require_settled("costs");
    require_pending("costs");
    reset_on_error([&] { measure_costs(); });
    return experience_.policy.costs.row(experience_.policy.row());
}

void Session::propose(const int32_t * ids, int32_t n) {
    require_settled("propose");
    require(n >= 0 && n < PF_MAX_NODES, "propose: a line has 0 to 63 tokens");
    check_ids(ids, (uint64_t) n);
    proposed_.n = n;
    std::copy_n(ids, n, proposed_.token);
    std::fill_n(proposed_.logp, n, 0.0f);
}

} // namespace pf
