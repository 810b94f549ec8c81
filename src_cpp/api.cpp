// The C interface of models and sessions: handles, status codes, no exceptions across. GGUF and quantisation are in
// api_gguf.cpp, the parts of a step in api_spec.cpp.
#include <chrono>
#include <cstdio>
#include <cstring>

#include "api_guard.h"
#include "api_handles.h"
#include "backend.h"
#include "ggml.h"
#include "host_memory.h"

namespace {

// Fixed, so that keeping a sentence cannot fail.
thread_local char last_error[2048];

} // namespace

int pf::set_last_error(int code, const char * message) noexcept {
    std::snprintf(last_error, sizeof(last_error), "%s", message);
    return code;
}

int pf_abi_version(void) {
    return PF_ABI_VERSION;
}

const char * pf_last_error(void) {
    return last_error;
}

// ---- devices -----------------------------------------------------------------------------------------------------

int pf_device_get_info(const char * name, pf_device_info * out) {
    return pf::guard([&] {
        pf::check_result(out);
        const std::string wanted = name ? name : "auto";
        ggml_backend_dev_t device = pf::find_device(wanted);
        pf_device_info info = {};
        size_t free = 0, total = 0;
        ggml_backend_dev_memory(device, &free, &total);
        info.is_cuda = device != pf::cpu_device();
        info.n_bytes = total;
        info.n_free = info.is_cuda ? free : pf::free_host_memory(); // ggml takes all of the host's memory for free
        std::snprintf(info.name, sizeof(info.name), "%s", ggml_backend_dev_description(device));
        if (wanted == "auto") {
            std::snprintf(info.why_cpu, sizeof(info.why_cpu), "%s", pf::why_auto_is_cpu().c_str());
        }
        pf::write_result(info, out);
    });
}

// ---- models ------------------------------------------------------------------------------------------------------

int pf_model_open(const char * path, const char * device, pf_model ** out) {
    return pf::guard([&] {
        pf::require(path && out, "pf_model_open: path and out must not be null");
        *out = new pf_model{pf::Target::open(path, pf::find_device(device ? device : "auto"))};
    });
}

void pf_model_free(pf_model * model) {
    delete model;
}

int pf_model_get_info(const pf_model * model, pf_model_info * out) {
    return pf::guard([&] {
        pf::require(model, "pf_model_get_info: model must not be null");
        pf::check_result(out);
        const pf::Target & t = *model->target;
        pf_model_info info = {};
        info.n_vocab = t.n_vocab;
        info.n_embd = t.n_embd;
        info.n_layer = t.n_layer;
        info.n_ctx_train = t.n_ctx_train;
        info.n_params = t.weights().n_params();
        info.n_bytes = t.weights().n_bytes();
        pf::write_result(info, out);
    });
}

int pf_draft_open(const char * path, const pf_model * target, pf_draft ** out) {
    return pf::guard([&] {
        pf::require(path && target && out, "pf_draft_open: path, target and out must not be null");
        *out = new pf_draft{pf::Drafter::open(path, target->target)};
    });
}

void pf_draft_free(pf_draft * draft) {
    delete draft;
}

int pf_draft_get_info(const pf_draft * draft, pf_draft_info * out) {
    return pf::guard([&] {
        pf::require(draft, "pf_draft_get_info: draft must not be null");
        pf::check_result(out);
        const pf::Drafter & d = *draft->drafter;
        pf_draft_info info = {};
        info.n_layer = d.n_layer;
        info.block_size = d.block_size;
        info.mask_token_id = d.mask_token_id;
        info.n_taps = (int32_t) d.taps.size();
        std::memcpy(info.taps, d.taps.data(), d.taps.size() * sizeof(int32_t));
        info.n_params = d.weights().n_params();
        info.n_bytes = d.weights().n_bytes();
        pf::write_result(info, out);
    });
}

// ---- sessions ----------------------------------------------------------------------------------------------------

void pf_session_params_default(pf_session_params * params) {
    *params = {};
    params->size = sizeof(*params);
    params->type_k = -1;
    params->type_v = -1;
    params->n_batch = 512;
    params->n_ring = 4096;
    params->budget = PF_BUDGET_AUTO;
}

void pf_generate_params_default(pf_generate_params * params) {
    *params = {};
    params->size = sizeof(*params);
    params->budget = PF_BUDGET_AUTO;
    params->shape = PF_SHAPE_TREE;
    params->top_p = 1.0f;
    params->repeat_penalty = 1.0f;
    params->n_logprobs = -1;
    params->copying = 1;
}

int pf_session_open(const pf_model * target, const pf_draft * draft, const pf_session_params * params,
                    pf_session ** out) {
    return pf::guard([&] {
        pf::require(target && out, "pf_session_open: target and out must not be null");
        const pf_session_params p = pf::read_params(params, pf_session_params_default);
        std::shared_ptr<const pf::Drafter> drafter = draft ? draft->drafter : nullptr;
        if (drafter && &drafter->target() != target->target.get()) {
            throw pf::Error(PF_ERR_MISMATCH, "pf_session_open: the drafter was opened for another target");
        }
        *out = new pf_session{target->target, drafter, pf::Session(target->target, drafter, p)};
    });
}

void pf_session_free(pf_session * session) {
    delete session;
}

int pf_session_reset(pf_session * session) {
    return pf::guard([&] {
        pf::require(session, "pf_session_reset: session must not be null");
        session->session.reset();
    });
}

int pf_session_n_ctx(const pf_session * session) {
    return session ? session->session.n_ctx() : 0;
}

int64_t pf_session_n_tokens(const pf_session * session) {
    return session ? session->session.n_tokens() : 0;
}

int pf_session_counters(const pf_session * session, pf_counters * out) {
    return pf::guard([&] {
        pf::require(session, "pf_session_counters: session must not be null");
        pf::check_result(out);
        pf::write_result(session->session.counters(), out);
    });
}

int pf_session_append(pf_session * session, const int32_t * ids, uint64_t n) {
    return pf::guard([&] {
        pf::require(session && (ids || n == 0), "pf_session_append: session and ids must not be null");
        session->session.append(ids, n);
    });
}

int pf_session_configure(pf_session * session, const pf_generate_params * params) {
    return pf::guard([&] {
        pf::require(session && params, "pf_session_configure: session and params must not be null");
        session->session.configure(pf::read_params(params, pf_generate_params_default));
    });
}

int pf_session_constrain(pf_session * session, const pf_constraint * constraint) {
    return pf::guard([&] {
        pf::require(session, "pf_session_constrain: session must not be null");
        pf::require(!constraint || constraint->size == sizeof(*constraint),
                    "pf_session_constrain: the size field is wrong; set it to sizeof");
        session->session.constrain(constraint);
    });
}

int pf_session_step(pf_session * session, int32_t max_tokens, pf_step_result * out) {
    return pf::guard([&] {
        pf::require(session, "pf_session_step: session must not be null");
        pf::check_result(out);
        pf_step_result result = {};
        session->session.step(max_tokens, result);
        pf::write_result(result, out);
    });
}

int pf_session_commit(pf_session * session, int32_t n_keep, double * commit_ms) {
    return pf::guard([&] {
        pf::require(session, "pf_session_commit: session must not be null");
        const auto start = std::chrono::steady_clock::now();
        session->session.commit(n_keep);
        if (commit_ms) {
            *commit_ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
        }
    });
}

int pf_session_logprobs(const pf_session * session, float * logp, int32_t * top_ids, float * top_logp) {
    return pf::guard([&] {
        pf::require(session && logp && top_ids && top_logp,
                    "pf_session_logprobs: session, logp, top_ids and top_logp must not be null");
        session->session.logprobs(logp, top_ids, top_logp);
    });
}

int pf_session_get_tokens(const pf_session * session, int64_t first, int64_t n, int32_t * out) {
    return pf::guard([&] {
        pf::require(session && (out || n == 0), "pf_session_get_tokens: session and out must not be null");
        session->session.get_tokens(first, n, out);
    });
}

int64_t pf_session_n_committed(const pf_session * session) {
    return session ? session->session.n_committed() : 0;
}

uint64_t pf_session_state_bytes(const pf_session * session, int64_t n) {
    uint64_t bytes = 0;
    pf::guard([&] { bytes = session ? session->session.state_bytes(n) : 0; });
    return bytes;
}

int pf_session_get_state(pf_session * session, void * out, uint64_t size) {
    return pf::guard([&] {
        pf::require(session && out, "pf_session_get_state: session and out must not be null");
        session->session.get_state(out, size);
    });
}

int pf_session_rewind(pf_session * session, int64_t n, const void * state, uint64_t size) {
    return pf::guard([&] {
        pf::require(session, "pf_session_rewind: session must not be null");
        session->session.rewind(n, state, size);
    });
}

int32_t pf_session_n_kv(const pf_session * session) {
    return session ? session->session.n_kv() : 0;
}

uint64_t pf_session_kv_row_bytes(const pf_session * session, int32_t tensor) {
    return session ? session->session.kv_row_bytes(tensor) : 0;
}

int pf_session_get_kv(pf_session * session, int32_t tensor, int64_t first, int64_t n, void * out, uint64_t size) {
    return pf::guard([&] {
        pf::require(session && (out || size == 0), "pf_session_get_kv: session and out must not be null");
        session->session.get_kv(tensor, first, n, out, size);
    });
}

int pf_session_set_kv(pf_session * session, int32_t tensor, int64_t first, int64_t n, const void * rows,
                      uint64_t size) {
    return pf::guard([&] {
        pf::require(session && (rows || size == 0), "pf_session_set_kv: session and rows must not be null");
        session->session.set_kv(tensor, first, n, rows, size);
    });
}

int pf_session_restore(pf_session * session, const int32_t * ids, int64_t n, const void * state, uint64_t size) {
    return pf::guard([&] {
        pf::require(session && (ids || n == 0), "pf_session_restore: session and ids must not be null");
        session->session.restore(ids, n, state, size);
    });
}

int pf_session_copy(pf_session * to, pf_session * from) {
    return pf::guard([&] {
        pf::require(to && from, "pf_session_copy: both sessions must not be null");
        to->session.copy(from->session);
    });
}

int pf_session_get_costs(pf_session * session, pf_costs * out) {
    return pf::guard([&] {
        pf::require(session, "pf_session_get_costs: session must not be null");
        pf::check_result(out);
        static_assert(PF_N_PASSES == pf::n_pass_sizes, "pf_costs has a place for every size");
        const pf::Costs::Row row = session->session.costs();
        pf_costs costs = {};
        std::copy(pf::pass_sizes.begin(), pf::pass_sizes.end(), costs.n_nodes);
        std::copy(row.pass.begin(), row.pass.end(), costs.pass_ms);
        costs.draft_ms = *std::max_element(row.draft.begin(), row.draft.end()); // of a whole block
        pf::write_result(costs, out);
    });
}

uint64_t pf_session_experience_bytes(void) {
    return sizeof(double) * pf::Experience::n_values;
}

int pf_session_get_experience(const pf_session * session, void * out, uint64_t size) {
    return pf::guard([&] {
        pf::require(session && out && size == pf_session_experience_bytes(),
                    "pf_session_get_experience: session and out must not be null, size must be the experience's");
        std::array<double, pf::Experience::n_values> values;
        session->session.experience().save(values.data());
        std::memcpy(out, values.data(), size);
    });
}

int pf_session_set_experience(pf_session * session, const void * experience, uint64_t size) {
    return pf::guard([&] {
        pf::require(session && experience, "pf_session_set_experience: session and experience must not be null");
        std::array<double, pf::Experience::n_values> values = {};
        std::memcpy(values.data(), experience, std::min<uint64_t>(size, sizeof(values)));
        pf::Experience read;
        if (size != sizeof(values) || !read.load(values.data())) {
            throw pf::Error(PF_ERR_FORMAT, "this is not what pf_session_get_experience gave");
        }
        session->session.set_experience(read);
    });
}

int pf_session_propose(pf_session * session, const int32_t * ids, int32_t n) {
    return pf::guard([&] {
        pf::require(session && (ids || n == 0), "pf_session_propose: session and ids must not be null");
        session->session.propose(ids, n);
    });
}

int pf_session_logits(pf_session * session, const int32_t * ids, uint64_t n, float * out) {
    return pf::guard([&] {
        pf::require(session && ids && out, "pf_session_logits: session, ids and out must not be null");
        session->session.logits(ids, n, out);
    });
}

int pf_session_hidden(pf_session * session, const int32_t * ids, uint64_t n, const int32_t * layers, int32_t n_layers,
                      float * out) {
    return pf::guard([&] {
        pf::require(session && ids && layers && out && n_layers > 0,
                    "pf_session_hidden: session, ids, layers and out must not be null, and n_layers positive");
        session->session.hidden(ids, n, std::vector<int32_t>(layers, layers + n_layers), out);
    });
}

int pf_session_draft_logits(pf_session * session, const int32_t * ids, uint64_t n, float * out) {
    return pf::guard([&] {
        pf::require(session && ids && out, "pf_session_draft_logits: session, ids and out must not be null");
        session->session.draft_logits(ids, n, out);
    });
}
