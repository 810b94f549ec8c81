#include "session.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <string>

#include "error.h"
#include "spec/logits.h"
#include "timer.h"

namespace pf {

namespace {

[[noreturn]] void throw_unusable(const char * who) {
    throw Error(PF_ERR_INTERNAL, std::string(who) + " produced logits that are not finite (NaN, +inf, or nothing above "
                                                    "-inf); its weights are damaged or overflow");
}

} // namespace

Session::Session(std::shared_ptr<const Target> target, std::shared_ptr<const Drafter> drafter,
                 const pf_session_params & given)
    : target_(std::move(target)), drafter_(std::move(drafter)), plan_(require_plan(*target_, drafter_.get(), given)),
      n_ctx_(plan_.params.n_ctx), n_batch_(given.n_batch), runner_(*target_, drafter_.get(), plan_.params),
      chooser_(target_->n_vocab), copier_(n_ctx_) {
    if (drafter_) {
        top_ids_.resize((size_t) (drafter_->block_size * PF_MAX_NODES));
        top_logp_.resize(top_ids_.size());
    }
    tokens_.reserve((size_t) n_ctx_);
    choice_.resize(2 * PF_MAX_NODES);
    for (auto * v : {&nodes_.token, &nodes_.parent, &nodes_.depth}) {
        v->resize((size_t) runner_.max_nodes());
    }
    pf_generate_params greedy;
    pf_generate_params_default(&greedy);
    greedy.budget = given.budget;
    configure(greedy);
}

void Session::reset() {
    n_ = 0;
    tokens_.clear();
    uncommitted_ = false;
    proposed_.n = 0;
    chooser_.end(); // of a step that failed on its way
    chooser_.counts.clear();
    copier_.clear();
    fixed_rates_ = {};
    runner_.clear();
}

// stands(error): whether the session stands as it should all the same.
void Session::reset_on_error(const std::function<void()> & body, const std::function<bool(const Error &)> & stands) {
    try {
        body();
    } catch (const Error & e) {
        if (stands && stands(e)) {
            throw;
        }
        reset();
        throw Error(e.code, std::string(e.what()) + "; the session was reset");
    } catch (...) {
        reset();
        throw;
    }
}

void Session::check_ids(const int32_t * ids, uint64_t n) const {
    for (uint64_t i = 0; i < n; ++i) {
        if (ids[i] < 0 || ids[i] >= target_->n_vocab) {
            throw Error(PF_ERR_ARGUMENT, "token " + std::to_string(ids[i]) + " at index " + std::to_string(i) +
                                             " is outside the vocabulary of " + std::to_string(target_->n_vocab));
        }
    }
}

// For n tokens behind those that are held.
void Session::check_room(uint64_t n, int64_t n_held) const {
    if (n > (uint64_t) (n_ctx_ - n_held)) {
        const uint64_t total = (uint64_t) n_held + n;
        throw Error(PF_ERR_CONTEXT, "the session holds " + std::to_string(n_held) + " tokens and " + std::to_string(n) +
                                        " more do not fit into n_ctx " + std::to_string(n_ctx_) + ": " +
                                        std::to_string(total - (uint64_t) n_ctx_) + " too many");
    }
}

void Session::require_settled(const char * what) const {
    if (uncommitted_) {
        throw Error(PF_ERR_STATE, std::string(what) + ": the last step has not been committed");
    }
}

void Session::require_pending(const char * what) const {
    if (n_tokens() == n_) {
        throw Error(PF_ERR_STATE, std::string(what) + ": nothing is pending; append at least one token first");
    }
}

void Session::configure(const pf_generate_params & params) {
    require_settled("configure");
    if (params.budget != PF_BUDGET_AUTO && (params.budget < 0 || params.budget >= PF_MAX_NODES)) {
        throw Error(PF_ERR_ARGUMENT, "budget is " + std::to_string(params.budget) + "; it must be 0 to " +
                                         std::to_string(PF_MAX_NODES - 1) + ", or PF_BUDGET_AUTO");
    }
    if (params.shape != PF_SHAPE_TREE && params.shape != PF_SHAPE_CHAIN) {
        throw Error(PF_ERR_ARGUMENT, "shape must be PF_SHAPE_TREE or PF_SHAPE_CHAIN");
    }
    if (params.n_stop_ids > 0 && !params.stop_ids) {
        throw Error(PF_ERR_ARGUMENT, "n_stop_ids is set, but stop_ids is null");
    }
    check_ids(params.stop_ids, params.n_stop_ids);
    const bool searches = params.budget == PF_BUDGET_AUTO;
    int32_t budget = drafter_ ? params.budget : 0;
    if (drafter_ && searches) { // within what the session has set aside, if it has
        budget = plan_.params.budget > 0 ? plan_.params.budget : PF_MAX_NODES - 1;
    }
    if (drafter_ && params.shape == PF_SHAPE_CHAIN) {
        budget = std::min(budget, drafter_->block_size - 1); // a chain cannot be longer: no pads for what cannot be
    }
    runner_.reserve_tree(budget + 1);
    chooser_.configure(params);
    budget_ = budget;
    searches_ = searches && budget > 0;
    sampled_ = params.temperature > 0;
    shape_ = params.shape;
    copying_ = params.copying != 0;
    stop_ids_.assign(params.stop_ids, params.stop_ids + params.n_stop_ids);
    chooser_.counts.append(nullptr, 0); // a run begins: nothing is its output yet
}

void Session::constrain(const pf_constraint * given) {
    require_settled("constrain");
    constraint_ = given ? std::make_optional<Constraint>(*given, target_->n_vocab) : std::nullopt;
}

// ---- prefill -----------------------------------------------------------------------------------------------------

// Evaluates the timeline's tokens in chunks until n of them are committed; read(outputs, first, count) sees what each
// chunk's pass gave. Chunks end at multiples of n_batch: a prompt given in pieces is computed as in one piece, as far as
// the pieces allow.
template <class Read>
void Session::evaluate(int64_t n, PassOptions options, Read && read) {
    options.commit = true; // a prompt is a chain whose end is known
    while (n_ < n) {
        const int32_t count = (int32_t) std::min<int64_t>(n_batch_ - n_ % n_batch_, n - n_);
        const int32_t * ids = tokens_.data() + n_;
        nodes_.n_real = count;
        nodes_.n = node_bucket(count);
        for (int32_t i = 0; i < nodes_.n; ++i) {
            i < count ? nodes_.set(i, ids[i], i - 1, i) : nodes_.set(i, ids[0], -1, 0);
        }
        read(runner_.pass(nodes_, n_, options), (size_t) n_, (size_t) count);
        if (options.taps) {
            runner_.append_context(nullptr, count, n_);
        }
        n_ += count;
    }
}

void Session::append(const int32_t * ids, uint64_t n) {
    require_settled("append");
    check_ids(ids, n);
    check_room(n, n_tokens());
    if (n == 0) {
        return;
    }
    reset_on_error([&] {
        tokens_.insert(tokens_.end(), ids, ids + n);
        PassOptions options;
        options.taps = taps();
        evaluate(n_tokens() - 1, options, [](const PassOutputs &, size_t, size_t) {}); // the last becomes pending
        chooser_.counts.append(ids, n);
        copier_.grow(tokens_.data(), n_tokens());
    });
}

// ---- the decode step ---------------------------------------------------------------------------------------------

void Session::step(int32_t max_tokens, pf_step_result & out) {
    require_settled("step");
    require_pending("step");
    if (max_tokens < 1) {
        throw Error(PF_ERR_ARGUMENT, "step: max_tokens must be at least 1");
    }
    if (n_tokens() >= n_ctx_) {
        throw Error(PF_ERR_CONTEXT,
                    "n_ctx " + std::to_string(n_ctx_) + " is used up; open the session with a larger one");
    }
    bool root_stands = false; // committed on the way
    const auto draft_to_accept = [&] {
        if (searches_) {
            get_ready_to_search();
        }
        Timer timer;
        const int32_t room = (int32_t) std::min<int64_t>({n_ctx_ - n_tokens(), max_tokens, PF_MAX_NODES});
        spent_ = {};
        spent_.graphs_built = runner_.counters().graphs_built;

        // 1. Draft a block, and 2. build the tree, no deeper than what may still be said.
        Block block = new_block();
        const int32_t n_depth = std::min(block.n_drafted, room - 1);
        const int32_t n_line = n_depth > 0 ? std::min(budget_, room - 1) : 0;
        if (searches_) {
            search_tree(block, n_depth, n_line);
        } else {
            if (n_depth > 0) {
                draft(block, n_depth);
            }
            out.draft_ms = timer.lap_ms();
            line_ = given_line(n_line);
            if (!line_) {
                line_ = copied_line(block, n_line);
            }
            grow_tree(block, n_depth > 0 ? budget_ : 0);
        }
        const double drafting_ms = spent_.context_ms + spent_.draft_ms; // within the search
        out.draft_ms += drafting_ms;
        out.build_ms = timer.lap_ms() - drafting_ms;

        // 3. Verify it in one pass. A root alone is its own path: it is committed on the way.
        const int32_t n_pass = searches_ ? pass_sizes[(size_t) pass_size_of(tree_.n_nodes)] : budget_ + 1;
        nodes_.n_real = tree_.n_nodes;
        nodes_.n = tree_.n_nodes == 1 ? 1 : n_pass;
        for (int32_t i = 0; i < nodes_.n; ++i) {
            i < tree_.n_nodes ? nodes_.set(i, tree_.token[i], tree_.parent[i], tree_.depth[i])
                              : nodes_.set(i, pending(), -1, 0);
        }
        PassOptions options;
        Constraint * const constraint = constraint_ ? &*constraint_ : nullptr;
        const bool reads_logits = chooser_.reads_logits() || constraint;
        if (reads_logits) {
            logits_.resize((size_t) target_->n_vocab);
        }
        options.head = reads_logits ? PassHead::logits : PassHead::choice;
        options.commit = nodes_.n == 1;
        options.taps = taps();
        const PassOutputs & verified = runner_.pass(nodes_, n_, options);
        root_stands = options.commit;
        if (!reads_logits) {
            runner_.read(verified.choice, 0, tree_.n_nodes, choice_.data());
        }
        out.verify_ms = timer.lap_ms();

        // 4. Accept along the target's own choices.
        chooser_.begin();
        accept(
            tree_, room,
            [&](int32_t node) {
                if (reads_logits) {
                    runner_.read(verified.logits, node, 1, logits_.data());
                    if (searches_ && node == 0) {
                        experience_.policy.saw_target(-LogSoftmax(logits_.data(), target_->n_vocab).log_sum);
                    }
                    return chooser_.choose(logits_.data(), n_ + tree_.depth[node] + 1, constraint);
                }
                const int32_t token = choice_[(size_t) (2 * node)];
                if (token < 0) {
                    throw_unusable("the model");
                }
                if (searches_ && node == 0) {
                    float logp;
                    std::memcpy(&logp, &choice_[1], sizeof logp);
                    experience_.policy.saw_target(logp);
                }
                return token;
            },
            [&](int32_t token) { return std::find(stop_ids_.begin(), stop_ids_.end(), token) != stop_ids_.end(); },
            accepted_);
        chooser_.end();
        if (!constraint) { // else what the target chose was not only its own to choose
            learn(block);
        }
        out.accept_ms = timer.lap_ms();
        spent_.pass_ms = out.build_ms + out.verify_ms + out.accept_ms;

        out.n_tokens = accepted_.n_path;
        std::copy(accepted_.tokens, accepted_.tokens + accepted_.n_path, out.tokens);
        out.n_nodes = tree_.n_nodes;
        out.max_depth = *std::max_element(tree_.depth, tree_.depth + tree_.n_nodes);
        out.expected = 0;
        for (int32_t i = 0; i < tree_.n_nodes; ++i) {
            out.expected += std::exp((double) tree_.score[i]);
        }
        out.stopped = accepted_.stopped ? 1 : 0;
        out.n_copied = copier_.n_right(accepted_.tokens, accepted_.n_path - 1);
        proposed_.n = 0;
        uncommitted_ = true;
    };
    // Where what may be said leaves nothing to say, nothing is said, and all that stood still stands.
    reset_on_error(draft_to_accept, [&](const Error & e) {
        if (e.code != PF_ERR_ARGUMENT && e.code != PF_ERR_STATE) {
            return false;
        }
        chooser_.end();
        copier_.forget();
        proposed_.n = 0;
        if (root_stands) {
            if (drafter_) {
                runner_.append_context(nullptr, 1, n_);
            }
            ++n_;
        }
        return true;
    });
}

Session::Block Session::new_block() const {
    Block block;
    block.n_rank = shape_ == PF_SHAPE_CHAIN ? 1 : std::min(budget_, target_->n_vocab);
    block.n_drafted = drafter_ ? std::min(drafter_->block_size - 1, budget_) : 0;
    return block;
}

// The n_depth upper depths of a block; the graph is that of all that was asked for.
void Session::draft(Block & block, int32_t n_depth) {
    runner_.draft(pending(), n_, block.n_drafted, block.n_rank, top_ids_.data(), top_logp_.data());
    for (int32_t d = 0; d < n_depth; ++d) {
        if (top_ids_[(size_t) (d * block.n_rank)] < 0) {
            throw_unusable("the drafter");
        }
    }
    block.n_depth = n_depth;
}

// What is proposed besides the block: what must come next, or was asked for,
const Line * Session::given_line(int32_t n_most) {
    const Line * forced = constraint_ ? constraint_->forced(n_most) : nullptr;
    if (forced || proposed_.n == 0 || n_most == 0) {
        return forced;
    }
    proposed_.n = std::min(proposed_.n, n_most);
    return &proposed_;
}

// or else can be copied.
const Line * Session::copied_line(const Block & block, int32_t n_most) {
    if (!copying_ || n_most == 0) {
        return nullptr;
    }
    return copier_.propose(copy_rates(), tokens_.data(), n_tokens(), n_most, top_ids_.data(), top_logp_.data(),
                           block.n_depth, block.n_rank);
}

// The tree of the block and the line, of what may be said.
void Session::grow_tree(const Block & block, int32_t budget) {
    Allowed allowed;
    if (constraint_) {
        allowed = [&](const int32_t * path, int32_t n) { return constraint_->allowed(path, n); };
    }
    build_tree(top_ids_.data(), top_logp_.data(), block.n_depth, block.n_depth > 0 ? block.n_rank : 0, budget, shape_,
               searches_ ? &calibrator().learned() : nullptr, pending(), line_, allowed, tree_);
}

// From every node that was visited: which of the tokens drafted for the place below it did the target choose?
void Session::learn(const Block & block) {
    int32_t deviations = 0;
    for (int32_t i = 0; i < accepted_.n_path; ++i) {
        const int32_t node = accepted_.path[i], depth = tree_.depth[node];
        if (depth >= block.n_depth) {
            return;
        }
        deviations += tree_.rank[node] != 0 ? 1 : 0;
        const size_t row = (size_t) (depth * block.n_rank);
        calibrator().see(depth + 1, deviations, &top_logp_[row], block.n_rank,
                         rank_of(accepted_.tokens[i], &top_ids_[row], block.n_rank));
    }
}

// 5. Commit the accepted path, or the part of it that the caller keeps.
void Session::commit(int32_t n_keep) {
    if (!uncommitted_) {
        throw Error(PF_ERR_STATE, "commit: there is no step to commit");
    }
    if (n_keep < 1 || n_keep > accepted_.n_path) {
        throw Error(PF_ERR_ARGUMENT, "commit: n_keep is " + std::to_string(n_keep) + ", but the step has 1 to " +
                                         std::to_string(accepted_.n_path) + " tokens");
    }
    Timer timer;
    reset_on_error([&] {
        if (tree_.n_nodes > 1) {
            runner_.commit(accepted_.path, n_keep, nodes_.n, n_);
        }
        if (drafter_) {
            runner_.append_context(accepted_.path, n_keep, n_);
        }
        n_ += n_keep;
        tokens_.insert(tokens_.end(), accepted_.tokens, accepted_.tokens + n_keep);
        std::for_each(accepted_.tokens, accepted_.tokens + n_keep, [&](int32_t id) { chooser_.counts.say(id); });
        copier_.learn(accepted_.tokens, n_keep, copy_rates());
        copier_.grow(tokens_.data(), n_tokens());
        uncommitted_ = false;
    });
    if (searches_) {
        experience_.policy.finished(n_keep, nodes_.n, spent_.draft_ms, spent_.pass_ms + timer.lap_ms(),
                                    runner_.counters().graphs_built == spent_.graphs_built);
    }
}

// ---- for anyone who wants to check us ----------------------------------------------------------------------------

void Session::logits(const int32_t * ids, uint64_t n, float * out) {
    check_ids(ids, n);
    check_room(n, 0);
    reset();
    PassOptions options;
    options.head = PassHead::logits;
    const size_t row = (size_t) target_->n_vocab;
    reset_on_error([&] {
        tokens_.assign(ids, ids + n);
        evaluate(n_tokens(), options, [&](const PassOutputs & pass, size_t first, size_t count) {
            runner_.read(pass.logits, 0, (int64_t) count, out + first * row);
        });
    });
    reset();
}

void Session::hidden(const int32_t * ids, uint64_t n, const std::vector<int32_t> & layers, float * out) {
    for (const int32_t layer : layers) {
        if (layer < 0 || layer > target_->n_layer) {
            throw Error(PF_ERR_ARGUMENT, "layer " + std::to_string(layer) +
                                             " does not exist; hidden states are the inputs of layers 0 to " +
                                             std::to_string(target_->n_layer) +
                                             " (the last is the output of the model's last layer)");
        }
    }
    if (std::set<int32_t>(layers.begin(), layers.end()).size() != layers.size()) {
        throw Error(PF_ERR_ARGUMENT, "a layer is asked for twice; name each layer once");
    }
    check_ids(ids, n);
    check_room(n, 0);
    reset();
    PassOptions options;
    options.capture = &layers;
    const size_t width = (size_t) target_->n_embd;
    runner_.drop_graphs(); // the layers asked for are not part of a graph's key
    reset_on_error([&] {
        tokens_.assign(ids, ids + n);
        evaluate(n_tokens(), options, [&](const PassOutputs & pass, size_t first, size_t count) {
            for (size_t l = 0; l < layers.size(); ++l) {
                for (size_t i = 0; i < count; ++i) {
                    runner_.read(pass.hidden[l], (int64_t) i, 1, out + ((first + i) * layers.size() + l) * width);
                }
            }
        });
    });
    runner_.drop_graphs();
    reset();
}

void Session::draft_logits(const int32_t * ids, uint64_t n, float * out) {
    if (!drafter_) {
        throw Error(PF_ERR_STATE, "draft_logits: the session has no drafter");
    }
    if (n == 0) {
        throw Error(PF_ERR_ARGUMENT, "draft_logits: give at least the pending token");
    }
    check_ids(ids, n);
    check_room(n, 0);
    reset();
    append(ids, n);
    reset_on_error([&] { runner_.draft_logits(pending(), n_, drafter_->block_size - 1, out); });
    reset();
}

} // namespace pf
