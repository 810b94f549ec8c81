// The C interface of memory plans.
#include <algorithm>
#include <cstdio>

#include "api_guard.h"
#include "api_handles.h"
#include "plan.h"

namespace {

void write_plan(const pf::Plan & plan, const std::vector<pf::Plan::Row> & rows, pf_plan * out) {
    pf_plan p = {};
    p.on_cuda = plan.on_cuda;
    p.fits = plan.fits;
    p.params = plan.params;
    p.total = plan.total;
    p.free = plan.free;
    for (const pf::Plan::Row & row : rows) {
        pf::require(p.n_rows < PF_MAX_ROWS, "a plan has more rows than pf_plan holds");
        p.rows[p.n_rows++] = {row.name, row.kind, row.n_bytes};
    }
    std::snprintf(p.advice, sizeof(p.advice), "%s", plan.advice.c_str());
    pf::write_result(p, out);
}

} // namespace

int pf_plan_make(const pf_model * target, const pf_draft * draft, const pf_session_params * params, const char * device,
                 uint64_t n_free, pf_plan * out) {
    return pf::guard([&] {
        pf::require(target && device, "pf_plan_make: target and device must not be null");
        pf::check_result(out);
        const pf_session_params p = pf::read_params(params, pf_session_params_default);
        const pf::Plan plan =
            pf::make_plan(*target->target, draft ? draft->drafter.get() : nullptr, p, {device, n_free});
        write_plan(plan, plan.rows, out);
    });
}

int pf_session_get_plan(const pf_session * session, pf_plan * out) {
    return pf::guard([&] {
        pf::require(session, "pf_session_get_plan: session must not be null");
        pf::check_result(out);
        write_plan(session->session.plan(), session->session.plan().rows, out);
    });
}

int pf_session_get_memory(const pf_session * session, pf_plan * out) {
    return pf::guard([&] {
        pf::require(session, "pf_session_get_memory: session must not be null");
        pf::check_result(out);
        write_plan(session->session.plan(), session->session.memory(), out);
    });
}
