#include "session.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <string>

#include "error.h"

namespace pf {

namespace {

constexpr int64_t kv_granule = 256; // KV views grow in these steps, so graphs repeat
constexpr int32_t chunk_granule = 64;

int64_t round_up(int64_t n, int64_t step) {
    return (n + step - 1) / step * step;
}

// Node counts that graphs are built for: powers of two up to 64, then multiples of 64.
int32_t node_bucket(int32_t n) {
    if (n >= chunk_granule) {
        return (int32_t) round_up(n, chunk_granule);
    }
    int32_t bucket = 1;
    while (bucket < n) {
        bucket *= 2;
    }
    return bucket;
}

// Nodes in the largest graph of a pair: a qwen35 layer takes about 60 with the saving of a tree.
size_t max_graph_nodes(const Target & target) {
    return 512 + 96 * (size_t) target.n_layer;
}

enum Kind : int64_t { kind_pass, kind_commit, kind_append, kind_draft };

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

} // namespace

struct Session::PassGraph : Graph {
    PassInputs in;
    CommitInputs commit;
    PassOutputs out;
};
struct Session::CommitGraph : Graph {
    CommitInputs in;
};
struct Session::AppendGraph : Graph {
    AppendInputs in;
};
struct Session::DraftGraph : Graph {
    DraftInputs in;
    ggml_tensor * logits = nullptr; // [n_vocab, n_depth]
};

namespace {

CommitInputs commit_inputs(const GraphBuilder & b, const StateShape & shape, int64_t n_nodes, bool move_rows) {
    CommitInputs in;
    if (shape.n_recurrent > 0) {
        in.path = b.input(GGML_TYPE_I32, n_nodes);
        in.conv_tail = b.input(GGML_TYPE_I32, shape.conv_width - 1);
        in.conv_from = b.input(GGML_TYPE_I32, shape.conv_width - 1);
    }
    if (move_rows) {
        in.kv_from = b.input(GGML_TYPE_I32, n_nodes);
        in.kv_to = b.input(GGML_TYPE_I64, n_nodes);
        in.ring_from = b.input(GGML_TYPE_I32, n_nodes);
        in.ring_to = b.input(GGML_TYPE_I64, n_nodes);
    }
    return in;
}

StateParams state_params(const Drafter * drafter, const pf_session_params & p, int64_t n_ctx) {
    StateParams s;
    s.n_ctx = n_ctx;
    s.type_k = (ggml_type) p.type_k;
    s.type_v = (ggml_type) p.type_v;
    if (drafter) {
        s.n_taps = (int) drafter->taps.size();
        s.n_ring = p.n_ring;
        s.type_ring = s.type_k == GGML_TYPE_F32 ? GGML_TYPE_F32 : GGML_TYPE_BF16;
    }
    return s;
}

int64_t checked_n_ctx(const Target & target, const pf_session_params & p) {
    const auto fail = [](const std::string & what) { throw Error(PF_ERR_ARGUMENT, what); };
    const int64_t trained = target.n_ctx_train;
    if (p.n_ctx < 0 || p.n_ctx > trained) {
        fail("n_ctx is " + std::to_string(p.n_ctx) + "; it must be 1 to the model's context length of " +
             std::to_string(trained) + ", or 0 for the default");
    }
    if (p.n_batch < 64 || p.n_batch > 4096 || p.n_batch % chunk_granule != 0) {
        fail("n_batch is " + std::to_string(p.n_batch) + "; it must be 64 to 4096 in steps of 64");
    }
    if (p.n_ring < std::max(p.n_batch, 256) || p.n_ring > (1 << 24)) {
        fail("n_ring is " + std::to_string(p.n_ring) + "; it must be at least n_batch and 256");
    }
    if (p.n_threads < 0 || p.n_threads > 512) {
        fail("n_threads is " + std::to_string(p.n_threads) + "; it must be 1 to 512, or 0 for one per core");
    }
    for (const int32_t type : {p.type_k, p.type_v}) {
        if (type != GGML_TYPE_F32 && type != GGML_TYPE_F16 && type != GGML_TYPE_Q8_0 && type != GGML_TYPE_Q4_0) {
            fail("the KV cache can be f32, f16, q8_0 or q4_0, not ggml type " + std::to_string(type));
        }
        if (target.state_shape.head_dim % ggml_blck_size((ggml_type) type) != 0) {
            throw Error(PF_ERR_UNSUPPORTED, std::string("this model's heads of ") +
                                                std::to_string(target.state_shape.head_dim) +
                                                " values do not divide into " + ggml_type_name((ggml_type) type) +
                                                " blocks; use f16 for the KV cache");
        }
    }
    return p.n_ctx > 0 ? p.n_ctx : std::min<int64_t>(trained, 4096);
}

} // namespace

Session::Session(std::shared_ptr<const Target> target, std::shared_ptr<const Drafter> drafter,
                 const pf_session_params & params)
    : target_(std::move(target)), drafter_(std::move(drafter)), n_ctx_(checked_n_ctx(*target_, params)),
      n_batch_(params.n_batch), state_params_(state_params(drafter_.get(), params, n_ctx_)),
      compute_(params.n_threads, max_graph_nodes(*target_)),
      mask_(round_up(n_ctx_ + PF_MAX_NODES, kv_granule) * std::max(n_batch_, PF_MAX_NODES), compute_.backend()) {
    const size_t n_nodes = (size_t) std::max(n_batch_, PF_MAX_NODES);
    state_ = std::make_unique<State>(target_->state_shape, state_params_, compute_.backend());
    if (drafter_) {
        // With an f32 target cache drafting is f32 throughout, ring included, else half precision will do.
        const ggml_type type = state_params_.type_k == GGML_TYPE_F32 ? GGML_TYPE_F32 : GGML_TYPE_F16;
        draft_cache_ =
            std::make_unique<DraftCache>(drafter_->n_layer, (int64_t) drafter_->n_head_kv * drafter_->head_dim,
                                         drafter_->block_size, state_params_.n_ring, type, compute_.backend());
        draft_logits_.resize((size_t) (drafter_->block_size - 1) * (size_t) target_->n_vocab);
        top_ids_.resize((size_t) drafter_->block_size * PF_MAX_NODES);
        top_logp_.resize(top_ids_.size());
        draft_mask_.resize((size_t) drafter_->block_size * (size_t) draft_cache_->n_slots);
    }
    for (auto * v : {&nodes_.token, &nodes_.parent, &nodes_.depth, &i32_}) {
        v->resize(n_nodes);
    }
    i64_.resize(n_nodes);
    embd_.resize(n_nodes * (size_t) target_->n_embd);
    row_.resize((size_t) target_->n_vocab);
    pf_generate_params greedy;
    pf_generate_params_default(&greedy);
    configure(greedy);
    reset();
}

Session::~Session() = default;

void Session::reset() {
    n_ = 0;
    pending_ = -1;
    uncommitted_ = false;
    state_->clear();
    mask_.forget();
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
    auto sampler = std::make_unique<Sampler>(target_->n_vocab, params);
    const int32_t budget = drafter_ ? params.budget : 0;
    if (budget + 1 > state_->max_nodes) {
        compute_.drop_graphs(); // they point at the old scratch
        state_->reserve_tree(budget + 1);
    }
    sampler_ = std::move(sampler);
    budget_ = budget;
    shape_ = params.shape;
    stop_ids_.assign(params.stop_ids, params.stop_ids + params.n_stop_ids);
}

// ---- passes ------------------------------------------------------------------------------------------------------

Session::PassGraph & Session::run_pass(const Nodes & nodes, const PassOptions & options) {
    const int64_t n = nodes.n, n_kv = std::min(round_up(n_ + n, kv_granule), state_->n_rows);
    const int64_t flags =
        options.commit | options.logits << 1 | (options.taps != nullptr) << 2 | (options.capture != nullptr) << 3;
    PassGraph & g =
        compute_.graph<PassGraph>({kind_pass, n, n_kv, flags}, [&](const GraphBuilder & b, PassGraph & graph) {
            graph.in.embd = b.input(GGML_TYPE_F32, target_->n_embd, n);
            graph.in.pos = b.input(GGML_TYPE_I32, n);
            graph.in.parent = b.input(GGML_TYPE_I32, n);
            graph.in.kv_rows = b.input(GGML_TYPE_I64, n);
            graph.in.ring_rows = b.input(GGML_TYPE_I64, n);
            graph.in.mask = mask_.view(b.ctx, n_kv, n);
            if (options.commit) {
                graph.commit = commit_inputs(b, target_->state_shape, n, false);
            }
            if (options.capture) {
                graph.out.hidden.resize(options.capture->size());
            }
            target_->build_pass(b, graph.in, graph.commit, *state_, options, graph.out);
        });

    embed_rows(target_->token_embd(), nodes.token.data(), n, embd_.data());
    set_input(g.in.embd, embd_.data());
    set_input(g.in.parent, nodes.parent.data());
    for (int64_t i = 0; i < n; ++i) {
        i32_[(size_t) i] = (int32_t) n_ + nodes.depth[(size_t) i];
        i64_[(size_t) i] = n_ + i;
    }
    set_input(g.in.pos, i32_.data());
    set_input(g.in.kv_rows, i64_.data());
    if (state_->ring) {
        for (int64_t i = 0; i < n; ++i) {
            i64_[(size_t) i] = (n_ + i) % state_params_.n_ring;
        }
        set_input(g.in.ring_rows, i64_.data());
    }
    mask_.write(g.in.mask, n_, nodes.parent.data());
    if (options.commit) {
        std::iota(i32_.begin(), i32_.begin() + nodes.n_real, 0);
        fill_commit(g.commit, nodes.n, i32_.data(), nodes.n_real);
    }
    compute_.run(g);
    return g;
}

// path holds the accepted nodes, root first; it may be i32_ itself.
void Session::fill_commit(const CommitInputs & in, int32_t n_nodes, const int32_t * path, int32_t n_path) {
    const int32_t taps = target_->state_shape.conv_width - 1;
    int32_t tail[64], from[64];
    for (int32_t r = 0; r < taps; ++r) {
        // New row r is entry n_path + r of (old rows, path).
        const int32_t entry = n_path + r;
        tail[r] = entry >= taps ? path[entry - taps] : 0;
        from[r] = entry >= taps ? taps + r : entry;
    }
    set_input(in.conv_tail, tail);
    set_input(in.conv_from, from);
    if (in.kv_from) {
        // Where nothing moves a row is copied onto itself: the root's, which always stays.
        const auto fill = [&](ggml_tensor * rows_from, ggml_tensor * rows_to, int64_t modulus) {
            for (int32_t i = 0; i < n_nodes; ++i) {
                i32_[(size_t) i] = (int32_t) ((n_ + (i < n_path ? path[i] : 0)) % modulus);
                i64_[(size_t) i] = (n_ + (i < n_path ? i : 0)) % modulus;
            }
            set_input(rows_from, i32_.data());
            set_input(rows_to, i64_.data());
        };
        fill(in.kv_from, in.kv_to, INT64_MAX);
        fill(in.ring_from, in.ring_to, std::max<int64_t>(1, state_params_.n_ring));
    }
    for (int32_t i = 0; i < n_path; ++i) {
        i32_[(size_t) i] = path[i];
    }
    std::fill(i32_.begin() + n_path, i32_.begin() + n_nodes, -1);
    set_input(in.path, i32_.data());
}

// ---- prefill -----------------------------------------------------------------------------------------------------

void Session::append(const int32_t * ids, uint64_t n) {
    require_settled("append");
    check_ids(ids, n);
    if (n == 0) {
        return;
    }
    if (n > (uint64_t) (n_ctx_ - n_tokens())) {
        throw Error(PF_ERR_CONTEXT, "the session holds " + std::to_string(n_tokens()) + " tokens and " +
                                        std::to_string(n) + " more do not fit into n_ctx " + std::to_string(n_ctx_) +
                                        "; " + std::to_string(n_tokens() + (int64_t) n - n_ctx_) + " too many");
    }
    reset_on_error([&] {
        // The old pending token goes first, the last new one becomes pending.
        std::vector<int32_t> chunk;
        chunk.reserve((size_t) n_batch_);
        const auto flush = [&] {
            if (!chunk.empty()) {
                PassOptions options;
                options.taps = drafter_ ? &drafter_->taps : nullptr;
                const int32_t n_chunk = (int32_t) chunk.size();
                evaluate(chunk.data(), n_chunk, options);
                append_context(n_, n_chunk);
                n_ += n_chunk;
                chunk.clear();
            }
        };
        for (uint64_t i = 0; i < n; ++i) {
            if (pending_ >= 0) {
                chunk.push_back(pending_);
            }
            pending_ = ids[i];
            if (chunk.size() == (size_t) n_batch_) {
                flush();
            }
        }
        flush();
    });
}

// One chunk of a prompt as a chain whose end is known: committed within the pass. The caller moves n_.
const Session::PassGraph & Session::evaluate(const int32_t * ids, int32_t n, PassOptions options) {
    nodes_.n_real = n;
    nodes_.n = node_bucket(n);
    for (int32_t i = 0; i < nodes_.n; ++i) {
        const bool real = i < n;
        nodes_.token[(size_t) i] = real ? ids[i] : ids[0];
        nodes_.parent[(size_t) i] = real ? i - 1 : -1;
        nodes_.depth[(size_t) i] = real ? i : 0;
    }
    options.commit = true;
    return run_pass(nodes_, options);
}

// ---- drafter -----------------------------------------------------------------------------------------------------

void Session::append_context(int64_t first, int32_t n) {
    if (!drafter_) {
        return;
    }
    const int32_t bucket = node_bucket(n);
    AppendGraph & g =
        compute_.graph<AppendGraph>({kind_append, bucket, 0, 0}, [&](const GraphBuilder & b, AppendGraph & graph) {
            graph.in.ring_rows = b.input(GGML_TYPE_I32, bucket);
            graph.in.pos = b.input(GGML_TYPE_I32, bucket);
            graph.in.slots = b.input(GGML_TYPE_I64, bucket);
            drafter_->build_append(b, graph.in, state_->ring, *draft_cache_);
        });
    for (int32_t i = 0; i < bucket; ++i) {
        const int64_t pos = first + std::min(i, n - 1);
        i32_[(size_t) i] = (int32_t) (pos % state_params_.n_ring);
        i64_[(size_t) i] = i < n ? draft_cache_->slot(pos) : draft_cache_->pad_slot();
    }
    set_input(g.in.ring_rows, i32_.data());
    set_input(g.in.slots, i64_.data());
    for (int32_t i = 0; i < bucket; ++i) {
        i32_[(size_t) i] = (int32_t) (first + std::min(i, n - 1));
    }
    set_input(g.in.pos, i32_.data());
    compute_.run(g);
}

void Session::fill_draft_mask(ggml_tensor * mask, bool sliding) {
    if (!mask) {
        return;
    }
    const ggml_fp16_t open = ggml_fp32_to_fp16(0.0f), closed = 0xfc00;
    const int64_t n_kv = mask->ne[0], block = drafter_->block_size;
    const int64_t first = std::max<int64_t>(0, n_ - draft_cache_->n_ring);
    for (int64_t slot = 0; slot < block; ++slot) {
        ggml_fp16_t * row = draft_mask_.data() + slot * n_kv;
        std::fill(row, row + n_kv, closed);
        for (int64_t t = 0; t < block; ++t) {
            row[t] = drafter_->sees(sliding, n_ + slot, n_ + t, true) ? open : closed;
        }
        for (int64_t p = first; p < n_; ++p) {
            row[draft_cache_->slot(p)] = drafter_->sees(sliding, n_ + slot, p, false) ? open : closed;
        }
    }
    set_input(mask, draft_mask_.data());
}

const float * Session::draft(int32_t n_depth) {
    const int64_t block = drafter_->block_size;
    const int64_t n_kv =
        std::min(round_up(block + std::min(n_, draft_cache_->n_ring), kv_granule), draft_cache_->n_slots);
    DraftGraph & g =
        compute_.graph<DraftGraph>({kind_draft, n_kv, n_depth, 0}, [&](const GraphBuilder & b, DraftGraph & graph) {
            graph.in.embd = b.input(GGML_TYPE_F32, target_->n_embd, block);
            graph.in.pos = b.input(GGML_TYPE_I32, block);
            graph.in.mask_full = drafter_->any_full ? b.input(GGML_TYPE_F16, n_kv, block) : nullptr;
            graph.in.mask_sliding = drafter_->any_sliding ? b.input(GGML_TYPE_F16, n_kv, block) : nullptr;
            graph.logits = drafter_->build_draft(b, graph.in, n_kv, n_depth, *draft_cache_);
        });
    drafter_->embed_block(pending_, embd_.data());
    set_input(g.in.embd, embd_.data());
    std::iota(i32_.begin(), i32_.begin() + block, (int32_t) n_);
    set_input(g.in.pos, i32_.data());
    fill_draft_mask(g.in.mask_full, false);
    fill_draft_mask(g.in.mask_sliding, true);
    compute_.run(g);
    ggml_backend_tensor_get(g.logits, draft_logits_.data(), 0, ggml_nbytes(g.logits));
    return draft_logits_.data();
}

// ---- the decode step ---------------------------------------------------------------------------------------------

void Session::draft_tree(int32_t n_depth, pf_step_result & out) {
    Timer timer;
    const int32_t n_rank = shape_ == PF_SHAPE_CHAIN ? 1 : std::min(budget_, target_->n_vocab);
    if (n_depth > 0) {
        const float * logits = draft(n_depth);
        for (int32_t d = 0; d < n_depth; ++d) {
            top_k(logits + (size_t) d * (size_t) target_->n_vocab, target_->n_vocab, n_rank,
                  top_ids_.data() + d * n_rank, top_logp_.data() + d * n_rank);
        }
    }
    out.draft_ms = timer.lap_ms();
    build_tree(top_ids_.data(), top_logp_.data(), n_depth, n_depth > 0 ? n_rank : 0, n_depth > 0 ? budget_ : 0, shape_,
               nullptr, pending_, tree_);
    out.build_ms = timer.lap_ms();
}

int32_t Session::choose(const PassGraph & pass, int32_t node, int64_t position) {
    const size_t row_bytes = (size_t) target_->n_vocab * sizeof(float);
    if (!sampler_->greedy()) {
        ggml_backend_tensor_get(pass.out.logits, row_.data(), (size_t) node * row_bytes, row_bytes);
        return sampler_->sample(row_.data(), position);
    }
    int32_t token = 0;
    float logit = 0.0f;
    ggml_backend_tensor_get(pass.out.argmax, &token, (size_t) node * sizeof(token), sizeof(token));
    ggml_backend_tensor_get(pass.out.logits, &logit, (size_t) node * row_bytes + (size_t) token * sizeof(logit),
                            sizeof(logit));
    if (!std::isfinite(logit)) {
        throw Error(PF_ERR_INTERNAL,
                    "the model produced logits that are not finite; its weights are damaged or too coarse");
    }
    return token;
}

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
        // 1, 2: draft a block and build the tree; no deeper than what may still be said.
        const int64_t room = std::min<int64_t>(n_ctx_ - n_tokens(), max_tokens);
        const int64_t n_depth = drafter_ ? std::min<int64_t>({drafter_->block_size - 1, budget_, room - 1}) : 0;
        draft_tree((int32_t) n_depth, out);

        // 3: verify. The root's path is known beforehand when it is all there is, so it is committed in the same pass.
        Timer timer;
        nodes_.n_real = tree_.n_nodes;
        nodes_.n = tree_.n_nodes == 1 ? 1 : budget_ + 1;
        for (int32_t i = 0; i < nodes_.n; ++i) {
            const bool real = i < tree_.n_nodes;
            nodes_.token[(size_t) i] = real ? tree_.token[i] : pending_;
            nodes_.parent[(size_t) i] = real ? tree_.parent[i] : -1;
            nodes_.depth[(size_t) i] = real ? tree_.depth[i] : 0;
        }
        PassOptions options;
        options.logits = true;
        options.commit = nodes_.n == 1;
        options.taps = drafter_ ? &drafter_->taps : nullptr;
        const PassGraph & pass = run_pass(nodes_, options);
        out.verify_ms = timer.lap_ms();

        // 4: accept along the target's own choices.
        accept(
            tree_, (int32_t) std::min<int64_t>(room, PF_MAX_NODES),
            [&](int32_t node) { return choose(pass, node, n_ + tree_.depth[node] + 1); },
            [&](int32_t token) { return std::find(stop_ids_.begin(), stop_ids_.end(), token) != stop_ids_.end(); },
            accepted_);
        out.accept_ms = timer.lap_ms();

        out.n_tokens = accepted_.n_path;
        std::copy(accepted_.tokens, accepted_.tokens + accepted_.n_path, out.tokens);
        out.n_nodes = tree_.n_nodes;
        out.max_depth = *std::max_element(tree_.depth, tree_.depth + tree_.n_nodes);
        out.stopped = accepted_.stopped ? 1 : 0;
        uncommitted_ = true;
    });
}

// 5: commit the accepted path, or the part of it that the caller keeps.
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
            // Numbered rank-0 path first: as long as the path follows it, every row is where it belongs.
            const bool move = accepted_.path[n_keep - 1] != n_keep - 1;
            const int32_t n_nodes = budget_ + 1;
            CommitGraph & g = compute_.graph<CommitGraph>(
                {kind_commit, n_nodes, move, 0}, [&](const GraphBuilder & b, CommitGraph & graph) {
                    graph.in = commit_inputs(b, target_->state_shape, n_nodes, move);
                    state_->commit_tree(b, n_nodes, graph.in);
                });
            fill_commit(g.in, n_nodes, accepted_.path, n_keep);
            compute_.run(g);
        }
        append_context(n_, n_keep);
        n_ += n_keep;
        pending_ = accepted_.tokens[n_keep - 1];
        uncommitted_ = false;
    });
}

// ---- for anyone who wants to check us ----------------------------------------------------------------------------

void Session::require_fits(uint64_t n) const {
    if (n > (uint64_t) n_ctx_) {
        throw Error(PF_ERR_CONTEXT, std::to_string(n) + " tokens do not fit into n_ctx " + std::to_string(n_ctx_));
    }
}

template <class Read>
void Session::evaluate_all(const int32_t * ids, uint64_t n, const PassOptions & options, Read && read) {
    check_ids(ids, n);
    require_fits(n);
    reset();
    reset_on_error([&] {
        for (uint64_t first = 0; first < n;) {
            const int32_t chunk = (int32_t) std::min<uint64_t>((uint64_t) n_batch_, n - first);
            const PassGraph & g = evaluate(ids + first, chunk, options);
            read(g, first, (size_t) chunk);
            n_ += chunk;
            first += (uint64_t) chunk;
        }
    });
    reset();
}

void Session::logits(const int32_t * ids, uint64_t n, float * out) {
    PassOptions options;
    options.logits = true;
    const size_t row = (size_t) target_->n_vocab;
    evaluate_all(ids, n, options, [&](const PassGraph & g, uint64_t first, size_t n_rows) {
        ggml_backend_tensor_get(g.out.logits, out + first * row, 0, n_rows * row * sizeof(float));
    });
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
    PassOptions options;
    options.capture = &layers;
    const size_t width = (size_t) target_->n_embd;
    compute_.drop_graphs(); // the layers asked for are not part of a graph's key
    evaluate_all(ids, n, options, [&](const PassGraph & g, uint64_t first, size_t n_rows) {
        for (size_t l = 0; l < layers.size(); ++l) {
            for (size_t i = 0; i < n_rows; ++i) {
                ggml_backend_tensor_get(g.out.hidden[l], out + ((first + i) * layers.size() + l) * width,
                                        i * width * sizeof(float), width * sizeof(float));
            }
        }
    });
    compute_.drop_graphs();
}

void Session::draft_logits(const int32_t * ids, uint64_t n, float * out) {
    if (!drafter_) {
        throw Error(PF_ERR_STATE, "draft_logits: the session has no drafter");
    }
    if (n == 0) {
        throw Error(PF_ERR_ARGUMENT, "draft_logits: give at least the pending token");
    }
    check_ids(ids, n);
    require_fits(n);
    reset();
    append(ids, n);
    reset_on_error([&] {
        const int32_t n_depth = drafter_->block_size - 1;
        const float * logits = draft(n_depth);
        std::copy(logits, logits + (size_t) n_depth * (size_t) target_->n_vocab, out);
    });
    reset();
}

} // namespace pf
