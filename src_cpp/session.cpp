#include "session.h"

#include <algorithm>
#include <chrono>
#include <set>
#include <string>

#include "error.h"
#include "snapshot.h"

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
    chooser_.end(); // of a step that failed on its way
    chooser_.counts.clear();
    copier_.clear();
    runner_.clear();
}

// stands(error): whether the session stands as it should all the same.
template <class Body, class Stands>
void Session::reset_on_error(Body && body, Stands && stands) {
    try {
        body();
    } catch (const Error & e) {
        if (stands(e)) {
            throw;
        }
        reset();
        throw Error(e.code, std::string(e.what()) + "; the session was reset");
    } catch (...) {
        reset();
        throw;
    }
}

template <class Body>
void Session::reset_on_error(Body && body) {
    reset_on_error(body, [](const Error &) { return false; });
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
    budget_ = budget;
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
    check_room(n);
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
    if (n_tokens() == n_) {
        throw Error(PF_ERR_STATE, "step: nothing is pending; append at least one token first");
    }
    if (max_tokens < 1) {
        throw Error(PF_ERR_ARGUMENT, "step: max_tokens must be at least 1");
    }
    if (n_tokens() >= n_ctx_) {
        throw Error(PF_ERR_CONTEXT,
                    "n_ctx " + std::to_string(n_ctx_) + " is used up; open the session with a larger one");
    }
    bool root_stands = false; // committed on the way
    const auto draft_to_accept = [&] {
        Timer timer;
        const int32_t room = (int32_t) std::min<int64_t>({n_ctx_ - n_tokens(), max_tokens, PF_MAX_NODES});

        // 1. Draft a block; look no deeper into it than what may still be said.
        const int32_t block_depth = drafter_ ? std::min(drafter_->block_size - 1, budget_) : 0;
        const int32_t n_depth = std::min(block_depth, room - 1);
        const int32_t n_rank = shape_ == PF_SHAPE_CHAIN ? 1 : std::min(budget_, target_->n_vocab);
        if (n_depth > 0) {
            runner_.draft(pending(), n_, block_depth, n_rank, top_ids_.data(), top_logp_.data());
            for (int32_t d = 0; d < n_depth; ++d) {
                if (top_ids_[(size_t) (d * n_rank)] < 0) {
                    throw_unusable("the drafter");
                }
            }
        }
        out.draft_ms = timer.lap_ms();

        // 2. Build the tree, of what may be said: the block, and what must come next or else what can be copied.
        Constraint * const constraint = constraint_ ? &*constraint_ : nullptr;
        const int32_t n_line = n_depth > 0 ? std::min(budget_, room - 1) : 0;
        Allowed allowed;
        const Line * line = nullptr;
        if (constraint) {
            allowed = [&](const int32_t * path, int32_t n) { return constraint->allowed(path, n); };
            line = constraint->forced(n_line);
        }
        if (!line && copying_ && n_line > 0) {
            line =
                copier_.propose(tokens_.data(), n_tokens(), n_line, top_ids_.data(), top_logp_.data(), n_depth, n_rank);
        }
        build_tree(top_ids_.data(), top_logp_.data(), n_depth, n_depth > 0 ? n_rank : 0, n_depth > 0 ? budget_ : 0,
                   shape_, nullptr, pending(), line, allowed, tree_);
        out.build_ms = timer.lap_ms();

        // 3. Verify it in one pass. A root alone is its own path: it is committed on the way.
        nodes_.n_real = tree_.n_nodes;
        nodes_.n = tree_.n_nodes == 1 ? 1 : budget_ + 1;
        for (int32_t i = 0; i < nodes_.n; ++i) {
            i < tree_.n_nodes ? nodes_.set(i, tree_.token[i], tree_.parent[i], tree_.depth[i])
                              : nodes_.set(i, pending(), -1, 0);
        }
        PassOptions options;
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
                    return chooser_.choose(logits_.data(), n_ + tree_.depth[node] + 1, constraint);
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
        out.n_copied = copier_.n_right(accepted_.tokens, accepted_.n_path - 1);
        uncommitted_ = true;
    };
    // Where what may be said leaves nothing to say, nothing is said, and all that stood still stands.
    reset_on_error(draft_to_accept, [&](const Error & e) {
        if (e.code != PF_ERR_ARGUMENT && e.code != PF_ERR_STATE) {
            return false;
        }
        chooser_.end();
        copier_.forget();
        if (root_stands) {
            if (drafter_) {
                runner_.append_context(nullptr, 1, n_);
            }
            ++n_;
        }
        return true;
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
        tokens_.insert(tokens_.end(), accepted_.tokens, accepted_.tokens + n_keep);
        std::for_each(accepted_.tokens, accepted_.tokens + n_keep, [&](int32_t id) { chooser_.counts.say(id); });
        copier_.learn(accepted_.tokens, n_keep);
        copier_.grow(tokens_.data(), n_tokens());
        uncommitted_ = false;
    });
}

// ---- going back, keeping, moving ---------------------------------------------------------------------------------

void Session::get_tokens(int64_t first, int64_t n, int32_t * out) const {
    if (first < 0 || n < 0 || first > n_tokens() || n > n_tokens() - first) {
        throw Error(PF_ERR_ARGUMENT, "get_tokens: " + std::to_string(n) + " tokens from " + std::to_string(first) +
                                         " on, but the session holds " + std::to_string(n_tokens()));
    }
    std::copy_n(tokens_.begin() + first, n, out);
}

void Session::require_empty(const char * what) const {
    require_settled(what);
    if (n_tokens() > 0) {
        throw Error(PF_ERR_STATE, std::string(what) + ": the session holds " + std::to_string(n_tokens()) +
                                      " tokens; reset it first");
    }
}

void Session::check_state(const char * what, const int32_t * ids, int64_t n, const void * state, uint64_t size) const {
    const uint64_t wanted = pf::state_bytes(runner_.caches(), n);
    if (!state || size != wanted) {
        throw Error(PF_ERR_ARGUMENT, std::string(what) + ": the state has " + std::to_string(state ? size : 0) +
                                         " bytes, but that of " + std::to_string(n) + " committed tokens has " +
                                         std::to_string(wanted) + " here");
    }
    if (!is_state_of(state, ids, n)) {
        throw Error(PF_ERR_ARGUMENT, std::string(what) + ": the state is not that of these " + std::to_string(n) +
                                         " tokens; give what get_state gave when the session stood at them");
    }
}

uint64_t Session::state_bytes(int64_t n) const {
    return n < 0 ? 0 : pf::state_bytes(runner_.caches(), n);
}

void Session::get_state(void * out, uint64_t size) const {
    require_settled("get_state");
    if (size != state_bytes(n_)) {
        throw Error(PF_ERR_ARGUMENT, "get_state: there is room for " + std::to_string(size) +
                                         " bytes, but the state has " + std::to_string(state_bytes(n_)));
    }
    pf::get_state(runner_.caches(), tokens_.data(), n_, out);
}

void Session::rewind(int64_t n, const void * state, uint64_t size) {
    require_settled("rewind");
    if (n < 0 || n > n_) {
        throw Error(PF_ERR_ARGUMENT, "rewind: to " + std::to_string(n) + " tokens, but the session has 0 to " +
                                         std::to_string(n_) + " committed ones to go back to");
    }
    if (n == 0) {
        return reset();
    }
    if (n < n_ || size > 0) {
        check_state("rewind", tokens_.data(), n, state, size);
        set_state(runner_.caches(), n, state);
    }
    n_ = n;
    copier_.shrink(tokens_.data(), n);
    tokens_.resize((size_t) n);
    chooser_.counts.rebuild(tokens_.data(), (uint64_t) n);
}

int32_t Session::n_kv() const {
    return n_kv_tensors(runner_.caches());
}

uint64_t Session::kv_row_bytes(int32_t tensor) const {
    return tensor < 0 || tensor >= n_kv() ? 0 : kv_tensor(runner_.caches(), tensor)->nb[1];
}

void Session::check_kv(const char * what, int32_t tensor, int64_t first, int64_t n, int64_t n_rows,
                       uint64_t size) const {
    if (tensor < 0 || tensor >= n_kv()) {
        throw Error(PF_ERR_ARGUMENT, std::string(what) + ": there is no cache tensor " + std::to_string(tensor) +
                                         "; there are " + std::to_string(n_kv()));
    }
    if (first < 0 || n < 0 || first > n_rows || n > n_rows - first) {
        throw Error(PF_ERR_ARGUMENT, std::string(what) + ": " + std::to_string(n) + " rows from " +
                                         std::to_string(first) + " on, but there are " + std::to_string(n_rows));
    }
    if (size != (uint64_t) n * kv_row_bytes(tensor)) {
        throw Error(PF_ERR_ARGUMENT, std::string(what) + ": " + std::to_string(size) + " bytes, but " +
                                         std::to_string(n) + " rows of tensor " + std::to_string(tensor) + " have " +
                                         std::to_string((uint64_t) n * kv_row_bytes(tensor)));
    }
}

void Session::get_kv(int32_t tensor, int64_t first, int64_t n, void * out, uint64_t size) const {
    require_settled("get_kv");
    check_kv("get_kv", tensor, first, n, n_, size);
    ggml_backend_tensor_get(kv_tensor(runner_.caches(), tensor), out, (size_t) first * kv_row_bytes(tensor), size);
}

void Session::set_kv(int32_t tensor, int64_t first, int64_t n, const void * rows, uint64_t size) {
    require_empty("set_kv");
    check_kv("set_kv", tensor, first, n, n_ctx_, size);
    ggml_backend_tensor_set(kv_tensor(runner_.caches(), tensor), rows, (size_t) first * kv_row_bytes(tensor), size);
}

void Session::restore(const int32_t * ids, int64_t n, const void * state, uint64_t size) {
    require_empty("restore");
    require(n >= 0, "restore: the number of tokens is negative");
    check_ids(ids, (uint64_t) n);
    check_room((uint64_t) n);
    check_state("restore", ids, n, state, size);
    set_state(runner_.caches(), n, state);
    tokens_.assign(ids, ids + n);
    n_ = n;
    chooser_.counts.rebuild(ids, (uint64_t) n);
    copier_.grow(ids, n);
}

void Session::copy(const Session & from) {
    require_settled("copy");
    from.require_settled("copy");
    if (this == &from) {
        return;
    }
    const pf_session_params &a = plan_.params, &b = from.plan_.params;
    if (target_ != from.target_ || drafter_ != from.drafter_) {
        throw Error(PF_ERR_MISMATCH, "copy: the two sessions were opened on different models");
    }
    if (a.type_k != b.type_k || a.type_v != b.type_v || a.n_ring != b.n_ring || a.n_batch != b.n_batch) {
        throw Error(PF_ERR_MISMATCH, "copy: the two sessions have different KV types, n_ring or n_batch");
    }
    if (from.n_tokens() > n_ctx_) {
        throw Error(PF_ERR_CONTEXT, "copy: the other session holds " + std::to_string(from.n_tokens()) +
                                        " tokens, which do not fit into n_ctx " + std::to_string(n_ctx_));
    }
    runner_.reserve_tree(from.budget_ + 1);
    reset_on_error([&] {
        budget_ = from.budget_;
        shape_ = from.shape_;
        copying_ = from.copying_;
        stop_ids_ = from.stop_ids_;
        chooser_ = from.chooser_;
        copy_timeline(from.runner_.caches(), runner_.caches(), from.n_);
        tokens_ = from.tokens_;
        n_ = from.n_;
        copier_.copy(from.copier_, tokens_.data(), n_tokens());
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
    reset();
    check_room(n);
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
    reset();
    append(ids, n);
    reset_on_error([&] { runner_.draft_logits(pending(), n_, drafter_->block_size - 1, out); });
    reset();
}

} // namespace pf
