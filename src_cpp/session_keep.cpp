// A session's timeline on its way elsewhere: going back, keeping, moving.
#include <algorithm>
#include <string>

#include "error.h"
#include "session.h"
#include "snapshot.h"

namespace pf {

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

void Session::get_state(void * out, uint64_t size) {
    require_settled("get_state");
    if (size != state_bytes(n_)) {
        throw Error(PF_ERR_ARGUMENT, "get_state: there is room for " + std::to_string(size) +
                                         " bytes, but the state has " + std::to_string(state_bytes(n_)));
    }
    runner_.settle_context();
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
        runner_.forget_context();
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
    check_room((uint64_t) n, n_tokens());
    check_state("restore", ids, n, state, size);
    set_state(runner_.caches(), n, state);
    tokens_.assign(ids, ids + n);
    n_ = n;
    chooser_.counts.rebuild(ids, (uint64_t) n);
    copier_.grow(ids, n);
}

void Session::copy(Session & from) {
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
        from.runner_.settle_context();
        runner_.forget_context();
        copy_timeline(from.runner_.caches(), runner_.caches(), from.n_);
        tokens_ = from.tokens_;
        n_ = from.n_;
        copier_.clear();
        copier_.grow(tokens_.data(), n_tokens());
        experience_ = from.experience_;
        fixed_rates_ = from.fixed_rates_;
    });
}

} // namespace pf
