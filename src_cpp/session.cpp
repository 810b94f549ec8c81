#include "session.h"

#include <algorithm>
#include <chrono>
#include <set>
#include <string>

#include "error.h"

namespace pf {

namespace {

class Timer {
  public:
    double lap_ms() {
        const auto now = std::chrono::steady_clock::now();
        const double ms = std::chrono::duration<double, std::milli>(now - start_).count();
        start_ = now;
        return ms;
    }

  private:
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

[[noreturn]] void throw_unusable(const char * who) {
    throw Error(PF_ERR_INTERNAL, std::string(who) + " produced logits that are not finite (NaN, +inf, or nothing above "
                                                    "-inf); its weights are damaged or overflow");
}

} // namespace

Session::Session(std::shared_ptr<const Target> target, std::shared_ptr<const Drafter> drafter,
                 const pf_session_params & given)
    : target_(std::move(target)), drafter_(std::move(drafter)), plan_(require_plan(*target_, drafter_.get(), given)),
      n_ctx_(plan_.params.n_ctx), n_batch_(given.n_batch), runner_(*target_, drafter_.get(), plan_.params),
      chooser_(target_->n_vocab) {
    if (drafter_) {
        top_ids_.resize((size_t) (drafter_->block_size * PF_MAX_NODES));
        top_logp_.resize(top_ids_.size());
    }
    choice_.resize(2 * PF_MAX_NODES);
    for (auto * v : {&nodes_.token, &nodes_.parent, &nodes_.depth}) {
        v->resize((size_t) runner_.max_nodes());
    }
    pf_generate_params greedy;
    pf_generate_params_default(&greedy);
    greedy.budget = given.budget;
    configure(greedy);
    reset();
}

void Session::reset() {
    n_ = 0;
    pending_ = -1;
    uncommitted_ = false;
    chooser_.counts.clear();
    runner_.clear();
}

template <class Body>
void Session::reset_on_error(Body && body) {
    try {
        body();
    } catch (const Error & e) {
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

void Session::check_room(uint64_t n) const {
    if (n > (uint64_t) (n_ctx_ - n_tokens())) {
        const uint64_t total = (uint64_t) n_tokens() + n;
        throw Error(PF_ERR_CONTEXT, "the session holds " + std::to_string(n_tokens()) + " tokens and " +
                                        std::to_string(n) + " more do not fit into n_ctx " + std::to_string(n_ctx_) +
                                        ": " + std::to_string(total - (uint64_t) n_ctx_) + " too many");
    }
}

void Session::require_settled(const char * what) const {
    if (uncommitted_) {
        throw Error(PF_ERR_STATE, std::string(what) + ": the last step has not been committed");
    }
}

void Session::configure(const pf_generate_params & params) {
    require_settled("configure");
    if (params.budget < 0 || params.budget >= PF_MAX_NODES) {
        throw Error(PF_ERR_ARGUMENT, "budget is " + std::to_string(params.budget) + "; it must be 0 to " +
                                         std::to_string(PF_MAX_NODES - 1));
    }
    if (params.shape != PF_SHAPE_TREE && params.shape != PF_SHAPE_CHAIN) {
        throw Error(PF_ERR_ARGUMENT, "shape must be PF_SHAPE_TREE or PF_SHAPE_CHAIN");
    }
    if (params.n_stop_ids > 0 && !params.stop_ids) {
        throw Error(PF_ERR_ARGUMENT, "n_stop_ids is set, but stop_ids is null");
    }
    check_ids(params.stop_ids, params.n_stop_ids);
    int32_t budget = drafter_ ? params.budget : 0;
    if (drafter_ && params.shape == PF_SHAPE_CHAIN) {
        budget = std::min(budget, drafter_->block_size - 1); // a chain cannot be longer: no pads for what cannot be
    }
    runner_.reserve_tree(budget + 1);
    chooser_.configure(params);
    logits_.resize(chooser_.reads_logits() ? (size_t) target_->n_vocab : 0);
    budget_ = budget;
    shape_ = params.shape;
    stop_ids_.assign(params.stop_ids, params.stop_ids + params.n_stop_ids);
}

// ---- prefill -----------------------------------------------------------------------------------------------------

// Evaluates and commits ids in chunks; read(outputs, first, count) sees what each chunk's pass gave.
template <class Read>
void Session::evaluate(const int32_t * ids, uint64_t n, PassOptions options, Read && read) {
    options.commit = true; // a prompt is a chain whose end is known
    for (uint64_t first = 0; first < n;) {
        const int32_t count = (int32_t) std::min<uint64_t>((uint64_t) n_batch_, n - first);
        nodes_.n_real = count;
        nodes_.n = node_bucket(count);
        for (int32_t i = 0; i < nodes_.n; ++i) {
            i < count ? nodes_.set(i, ids[first + (uint64_t) i], i - 1, i) : nodes_.set(i, ids[first], -1, 0);
        }
        read(runner_.pass(nodes_, n_, options), first, (size_t) count);
        if (options.taps) {
            runner_.append_context(nullptr, count, n_);
        }
        n_ += count;
        first += (uint64_t) count;
    }
}

void Session::append(const int32_t * ids, uint64_t n) {
    require_settled("append");
    check_ids(ids, n);
    check_room(n);
    if (n == 0) {
        return;
    }
    reset_on_error([&] {
        // The old pending token goes first, the last new one becomes pending.
        std::vector<int32_t> behind;
        if (pending_ >= 0) {
            behind.push_back(pending_);
        }
        behind.insert(behind.end(), ids, ids + n - 1);
        PassOptions options;
        options.taps = taps();
        evaluate(behind.data(), behind.size(), options, [](const PassOutputs &, uint64_t, size_t) {});
        pending_ = ids[n - 1];
        chooser_.counts.append(ids, n);
    });
}

// ---- the decode step ---------------------------------------------------------------------------------------------

void Session::step(int32_t max_tokens, pf_step_result & out) {
    require_settled("step");
    if (pending_ < 0) {
        throw Error(PF_ERR_STATE, "step: the timeline is empty; append a prompt first");
    }
    if (max_tokens < 1) {
        throw Error(PF_ERR_ARGUMENT, "step: max_tokens must be at least 1");
    }
    if (n_tokens() >= n_ctx_) {
        throw Error(PF_ERR_CONTEXT,
                    "n_ctx " + std::to_string(n_ctx_) + " is used up; open the session with a larger one");
    }
    reset_on_error([&] {
        Timer timer;
        const int32_t room = (int32_t) std::min<int64_t>({n_ctx_ - n_tokens(), max_tokens, PF_MAX_NODES});

        // 1. Draft a block; look no deeper into it than what may still be said.
        const int32_t block_depth = drafter_ ? std::min(drafter_->block_size - 1, budget_) : 0;
        const int32_t n_depth = std::min(block_depth, room - 1);
        const int32_t n_rank = shape_ == PF_SHAPE_CHAIN ? 1 : std::min(budget_, target_->n_vocab);
        if (n_depth > 0) {
            runner_.draft(pending_, n_, block_depth, n_rank, top_ids_.data(), top_logp_.data());
            for (int32_t d = 0; d < n_depth; ++d) {
                if (top_ids_[(size_t) (d * n_rank)] < 0) {
                    throw_unusable("the drafter");
                }
            }
        }
        out.draft_ms = timer.lap_ms();

        // 2. Build the tree.
        build_tree(top_ids_.data(), top_logp_.data(), n_depth, n_depth > 0 ? n_rank : 0, n_depth > 0 ? budget_ : 0,
                   shape_, nullptr, pending_, nullptr, {}, tree_);
        out.build_ms = timer.lap_ms();

        // 3. Verify it in one pass. A root alone is its own path: it is committed on the way.
        nodes_.n_real = tree_.n_nodes;
        nodes_.n = tree_.n_nodes == 1 ? 1 : budget_ + 1;
        for (int32_t i = 0; i < nodes_.n; ++i) {
            i < tree_.n_nodes ? nodes_.set(i, tree_.token[i], tree_.parent[i], tree_.depth[i])
                              : nodes_.set(i, pending_, -1, 0);
        }
        PassOptions options;
        const bool reads_logits = chooser_.reads_logits();
        options.head = reads_logits ? PassHead::logits : PassHead::choice;
        options.commit = nodes_.n == 1;
        options.taps = taps();
        const PassOutputs & verified = runner_.pass(nodes_, n_, options);
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
                    return chooser_.choose(logits_.data(), n_ + tree_.depth[node] + 1);
                }
                const int32_t token = choice_[(size_t) (2 * node)];
                if (token < 0) {
                    throw_unusable("the model");
                }
                return token;
            },
            [&](int32_t token) { return std::find(stop_ids_.begin(), stop_ids_.end(), token) != stop_ids_.end(); },
            accepted_);
        chooser_.end();
        out.accept_ms = timer.lap_ms();

        out.n_tokens = accepted_.n_path;
        std::copy(accepted_.tokens, accepted_.tokens + accepted_.n_path, out.tokens);
        out.n_nodes = tree_.n_nodes;
        out.max_depth = *std::max_element(tree_.depth, tree_.depth + tree_.n_nodes);
        out.stopped = accepted_.stopped ? 1 : 0;
        uncommitted_ = true;
    });
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
    reset_on_error([&] {
        if (tree_.n_nodes > 1) {
            runner_.commit(accepted_.path, n_keep, nodes_.n, n_);
        }
        if (drafter_) {
            runner_.append_context(accepted_.path, n_keep, n_);
        }
        n_ += n_keep;
        pending_ = accepted_.tokens[n_keep - 1];
        std::for_each(accepted_.tokens, accepted_.tokens + n_keep, [&](int32_t id) { chooser_.counts.say(id); });
        uncommitted_ = false;
    });
}

// ---- for anyone who wants to check us ----------------------------------------------------------------------------

void Session::logits(const int32_t * ids, uint64_t n, float * out) {
    check_ids(ids, n);
    reset();
    check_room(n);
    PassOptions options;
    options.head = PassHead::logits;
    const size_t row = (size_t) target_->n_vocab;
    reset_on_error([&] {
        evaluate(ids, n, options, [&](const PassOutputs & pass, uint64_t first, size_t count) {
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
    reset();
    check_room(n);
    PassOptions options;
    options.capture = &layers;
    const size_t width = (size_t) target_->n_embd;
    runner_.drop_graphs(); // the layers asked for are not part of a graph's key
    reset_on_error([&] {
        evaluate(ids, n, options, [&](const PassOutputs & pass, uint64_t first, size_t count) {
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
    reset();
    append(ids, n);
    reset_on_error([&] { runner_.draft_logits(pending_, n_, drafter_->block_size - 1, out); });
    reset();
}

} // namespace pf
