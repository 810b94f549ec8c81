#include "plan.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "backend.h"
#include "error.h"
#include "ggml-alloc.h"
#include "host_memory.h"
#include "plan_cuda.h"
#include "step_graphs.h"

namespace pf {

namespace {

constexpr uint64_t MiB = 1 << 20;

// What can't be measured before it is there: round figures with room, and marked as assumed.
constexpr uint64_t assumed_cuda_context = 320 * MiB; // context and kernels
constexpr uint64_t assumed_cublas = 32 * MiB;        // its workspace
constexpr uint64_t assumed_attention = 16 * MiB;     // partial results of split attention, from ggml's pool
constexpr uint64_t assumed_cpu = 32 * MiB;           // threads, tables, Python

// ---- one plan ------------------------------------------------------------------------------------------------------

// Where a plan's tensors would lie.
struct Site {
    bool on_cuda;
    bool loaded; // the weights are there already, and not part of what is free
    ggml_backend_buffer_type_t type;
    uint64_t free;
};

Site find_site(const Target & target, const PlanPlace & place) {
    require(place.device.empty() || place.device == "cpu" || place.device == "cuda",
            "device must be \"cpu\" or \"cuda\"");
    if (place.device == "cuda" && place.free > 0) {
        return {true, false, cuda_plan_type(), place.free};
    }
    ggml_backend_dev_t device = place.device.empty() ? target.weights().device() : find_device(place.device);
    ggml_backend_buffer_type_t type = ggml_backend_dev_buffer_type(device);
    if (is_host(device)) {
        return {false, false, type, place.free ? place.free : free_host_memory()};
    }
    size_t free = 0, all = 0;
    ggml_backend_dev_memory(device, &free, &all);
    return {true, place.device.empty(), type, free};
}

// Bytes of a model's weights on the device, each at the device's alignment: as they are, and with the wide ones at Q8_0.
struct WeightBytes {
    uint64_t as_is = 0, q8_0 = 0;
};

WeightBytes weight_bytes(const Weights & weights, const ggml_tensor * host_table, ggml_backend_buffer_type_t type) {
    WeightBytes n;
    const size_t alignment = ggml_backend_buft_get_alignment(type);
    for (const ggml_tensor * t : weights.tensors()) {
        if (t == host_table) {
            continue;
        }
        const uint64_t bytes = GGML_PAD(ggml_backend_buft_get_alloc_size(type, t), alignment);
        const bool wide = t->type == GGML_TYPE_F32 || t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_BF16;
        const bool matrix = t->ne[1] > 1 && t->ne[0] % ggml_blck_size(GGML_TYPE_Q8_0) == 0;
        n.as_is += bytes;
        n.q8_0 +=
            wide && matrix ? GGML_PAD(ggml_row_size(GGML_TYPE_Q8_0, t->ne[0]) * (size_t) t->ne[1], alignment) : bytes;
    }
    return n;
}

// What a backend wants besides, for the largest product of the graph: a copy of its input in the weights' terms, on the CPU
// of up to 6 bytes a value; on a card of 2, and one of its result where that is computed in half precision.
uint64_t product_scratch(ggml_cgraph * gf, bool on_cuda) {
    uint64_t most = 0;
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * t = ggml_graph_node(gf, i);
        if (t->op == GGML_OP_MUL_MAT) {
            const bool half = t->src[0]->type == GGML_TYPE_F16 || t->src[0]->type == GGML_TYPE_BF16;
            const int64_t n = ggml_nelements(t->src[1]);
            most = std::max(most, (uint64_t) (on_cuda ? 2 * (n + (half ? ggml_nelements(t) : 0)) : 6 * n));
        }
    }
    return most;
}

struct GallocrFree {
    void operator()(ggml_gallocr_t allocator) const { ggml_gallocr_free(allocator); }
};

uint64_t graph_bytes(ggml_cgraph * gf, ggml_backend_buffer_type_t type) {
    const std::unique_ptr<ggml_gallocr, GallocrFree> allocator(ggml_gallocr_new(type));
    size_t bytes = 0;
    ggml_gallocr_reserve_n_size(allocator.get(), gf, nullptr, nullptr, &bytes);
    return bytes;
}

const char * shape_name(const PassShape & s) {
    return s.options.commit ? "compute: prefill" : "compute: verify";
}
const char * shape_name(const CommitShape &) {
    return "compute: commit";
}
const char * shape_name(const AppendShape &) {
    return "compute: drafter context";
}
const char * shape_name(const DraftShape &) {
    return "compute: draft";
}

// params has its context and KV types.
Plan plan_at(const Target & target, const Drafter * drafter, const pf_session_params & params, const Site & site,
             bool draft_q8_0 = false) {
    Plan plan;
    plan.params = params;
    plan.on_cuda = site.on_cuda;
    plan.free = site.free;
    const auto add = [&](const char * name, uint64_t n_bytes, int32_t kind = PF_ROW_COUNTED) {
        plan.rows.push_back({name, kind, n_bytes});
    };

    // Embeddings are looked up on the host. A tied one is the head, too, and goes to the device as well.
    const ggml_tensor * table = target.token_embd();
    const bool tied = target.output.weight == table;
    uint64_t on_host = tied && !site.on_cuda ? 0 : ggml_nbytes(table);
    add("target weights", weight_bytes(target.weights(), tied ? nullptr : table, site.type).as_is);
    if (drafter) {
        const WeightBytes n = weight_bytes(drafter->weights(), drafter->own_token_embd(), site.type);
        add("drafter weights", draft_q8_0 ? n.q8_0 : n.as_is);
        on_host += drafter->own_token_embd() ? ggml_nbytes(drafter->own_token_embd()) : 0;
    }
    add("token embedding, on the host", on_host, site.on_cuda ? PF_ROW_ASIDE : PF_ROW_COUNTED);

    const Caches caches(target, drafter, params, {site.type, true});
    const std::vector<Plan::Row> cached = cache_rows(caches);
    plan.rows.insert(plan.rows.end(), cached.begin(), cached.end());

    uint64_t buffer = 0, plain = 0, scratch = 0, kept = 0;
    std::vector<Plan::Row> graphs;
    for_each_largest_graph(caches, params, [&](const auto & shape) {
        typename std::decay_t<decltype(shape)>::Graph graph(max_graph_nodes(target, drafter));
        build(caches, shape, graph);
        const uint64_t bytes = graph_bytes(graph.gf, without_copies(site.type));
        if (site.on_cuda) { // elsewhere there are no copies
            buffer = std::max(buffer, graph_bytes(graph.gf, site.type));
        }
        plain = std::max(plain, bytes);
        scratch = std::max(scratch, product_scratch(graph.gf, site.on_cuda));
        graph.trim();
        kept = std::max(kept, max_graphs * graph.n_bytes());
        const char * name = shape_name(shape);
        const auto same = std::find_if(graphs.begin(), graphs.end(), [&](auto & g) { return g.name == name; });
        if (same == graphs.end()) {
            graphs.push_back({name, PF_ROW_ASIDE, bytes});
        } else {
            same->n_bytes = std::max(same->n_bytes, bytes);
        }
    });
    add("compute buffer", plain);
    if (site.on_cuda) {
        add("flash attention's f16 copy of K and V", buffer - plain, PF_ROW_ASSUMED);
        add("CUDA context and cuBLAS", assumed_cuda_context + assumed_cublas, PF_ROW_ASSUMED);
        add("CUDA pool", scratch + assumed_attention, PF_ROW_ASSUMED);
    } else {
        add("work memory of the backend", scratch + assumed_cpu, PF_ROW_ASSUMED);
    }
    add(kept_graphs_row, kept, site.on_cuda ? PF_ROW_ASIDE : PF_ROW_ASSUMED);
    plan.rows.insert(plan.rows.end(), graphs.begin(), graphs.end());

    for (const Plan::Row & row : plan.rows) {
        plan.total += row.kind == PF_ROW_ASIDE ? 0 : row.n_bytes;
    }
    if (site.loaded) { // with the context and the weights what is free is what is left of the card
        plan.free += plan["target weights"] + plan["drafter weights"] + plan["CUDA context and cuBLAS"];
    }
    plan.fits = plan.total <= plan.free;
    return plan;
}

// ---- choosing ------------------------------------------------------------------------------------------------------

constexpr ggml_type kv_types[] = {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0};

bool divides(const Target & target, int32_t type) {
    return target.state_shape.head_dim % ggml_blck_size((ggml_type) type) == 0;
}

// Throws what is wrong with them.
void check_params(const Target & target, const pf_session_params & p) {
    const auto fail = [](const std::string & what) { throw Error(PF_ERR_ARGUMENT, what); };
    const int64_t trained = target.n_ctx_train;
    if (p.n_ctx < 0 || p.n_ctx > trained) {
        fail("n_ctx is " + std::to_string(p.n_ctx) + "; it must be 1 to the model's context length of " +
             std::to_string(trained) + ", or 0 for the largest that fits into memory");
    }
    if (p.n_batch < 64 || p.n_batch > 4096 || p.n_batch % 64 != 0) {
        fail("n_batch is " + std::to_string(p.n_batch) + "; it must be 64 to 4096 in steps of 64");
    }
    if (p.n_ring < std::max(p.n_batch, 256) || p.n_ring > (1 << 24)) {
        fail("n_ring is " + std::to_string(p.n_ring) + "; it must be at least n_batch and 256");
    }
    if (p.budget != PF_BUDGET_AUTO && (p.budget < 0 || p.budget >= PF_MAX_NODES)) {
        fail("budget is " + std::to_string(p.budget) + "; it must be 0 to " + std::to_string(PF_MAX_NODES - 1) +
             ", or PF_BUDGET_AUTO");
    }
    if (p.n_threads < 0 || p.n_threads > available_cores()) {
        fail("n_threads is " + std::to_string(p.n_threads) + "; it must be 1 to the " +
             std::to_string(available_cores()) + " cores this process may run on, or 0 for all of them");
    }
    for (const int32_t type : {p.type_k, p.type_v}) {
        if (type != -1 && std::find(std::begin(kv_types), std::end(kv_types), type) == std::end(kv_types)) {
            fail("the KV cache can be f32, f16, q8_0 or q4_0, not ggml type " + std::to_string(type));
        }
        if (type != -1 && !divides(target, type)) {
            throw Error(PF_ERR_UNSUPPORTED, "this model's heads of " + std::to_string(target.state_shape.head_dim) +
                                                " values do not divide into " + ggml_type_name((ggml_type) type) +
                                                " blocks; use f16 for the KV cache");
        }
    }
}

std::string mib(uint64_t n_bytes) {
    return std::to_string((n_bytes + MiB - 1) / MiB) + " MiB";
}

// Plans of one pair on one site.
struct Planner {
    const Target & target;
    const Drafter * drafter;
    Site site;

    Plan at(const pf_session_params & p, bool draft_q8_0 = false) const {
        return plan_at(target, drafter, p, site, draft_q8_0);
    }
};

bool fits_with_room(const Plan & plan) {
    return plan.total <= plan.free - plan.free / 20;
}

// The largest context that leaves a twentieth of the memory free; 0 when none does.
int32_t largest_context(const Planner & planner, pf_session_params p) {
    const auto fits = [&](int64_t n_ctx) {
        p.n_ctx = (int32_t) n_ctx;
        return fits_with_room(planner.at(p));
    };
    if (fits(planner.target.n_ctx_train)) {
        return planner.target.n_ctx_train;
    }
    int64_t low = 0, high = planner.target.n_ctx_train; // low fits or is 0, high does not
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (fits(middle) ? low : high) = middle;
    }
    return (int32_t) low;
}

// What would make a plan fit: each change by itself, or if no single one does all together, and a smaller context.
std::string advise(const Planner & planner, const Plan & plan) {
    std::vector<std::string> fitting;
    const auto offer = [&](const std::string & name, const pf_session_params & p, bool draft_q8_0) {
        const Plan changed = planner.at(p, draft_q8_0);
        if (changed.fits) {
            fitting.push_back(name + " (" + mib(changed.total) + ")");
        }
        return changed.total < plan.total;
    };
    pf_session_params all = plan.params;
    std::string kv_type, n_batch, q8_0; // what takes part in `all`
    for (const ggml_type type : {GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
        pf_session_params p = plan.params;
        p.type_k = p.type_v = type;
        const std::string name = std::string("kv_type ") + ggml_type_name(type);
        if (divides(planner.target, type) && offer(name, p, false)) {
            all.type_k = all.type_v = type;
            kv_type = name;
        }
    }
    pf_session_params p = plan.params;
    p.n_batch = 128;
    if (plan.params.n_batch > p.n_batch && offer("n_batch 128", p, false)) {
        all.n_batch = p.n_batch;
        n_batch = "n_batch 128";
    }
    if (planner.drafter && offer("the drafter at Q8_0", plan.params, true)) {
        q8_0 = "the drafter at Q8_0";
    }
    if (fitting.empty()) {
        std::string together;
        for (const std::string & name : {kv_type, n_batch, q8_0}) {
            together += (together.empty() || name.empty() ? "" : " with ") + name;
        }
        offer(together, all, !q8_0.empty());
    }
    if (const int32_t n_ctx = largest_context(planner, plan.params)) {
        fitting.push_back("n_ctx " + std::to_string(n_ctx));
    }
    std::string text;
    for (const std::string & change : fitting) {
        text += (text.empty() ? "what would fit: " : ", or ") + change;
    }
    return text.empty() ? "nothing that a session can do without would make it fit: take a smaller model" : text;
}

} // namespace

std::vector<Plan::Row> cache_rows(const Caches & caches) {
    std::vector<Plan::Row> rows = {
        {"KV cache", PF_ROW_COUNTED, caches.state.kv_bytes()},
        {"recurrent and convolution state", PF_ROW_COUNTED, caches.state.recurrent_bytes()},
        {"tree scratch", PF_ROW_COUNTED, caches.state.tree_bytes()},
    };
    if (caches.draft) {
        rows.push_back({"feature ring", PF_ROW_COUNTED, caches.state.feature_bytes()});
        rows.push_back({"drafter K/V ring", PF_ROW_COUNTED, caches.draft->n_bytes()});
    }
    return rows;
}

uint64_t Plan::operator[](const char * name) const {
    for (const Row & row : rows) {
        if (std::strcmp(row.name, name) == 0) {
            return row.n_bytes;
        }
    }
    return 0;
}

std::string Plan::table() const {
    std::string text;
    const auto line = [&](const char * name, double n_bytes, const char * note) {
        char row[160];
        std::snprintf(row, sizeof(row), "  %-40s %10.1f MiB%s\n", name, n_bytes / (double) MiB, note);
        text += row;
    };
    const char * notes[] = {"", "  assumed", "  not counted"};
    for (const Row & row : rows) {
        line(row.name, (double) row.n_bytes, notes[row.kind]);
    }
    line("total", (double) total, "");
    line("left", (double) free - (double) total, "");
    return text;
}

Plan make_plan(const Target & target, const Drafter * drafter, const pf_session_params & given,
               const PlanPlace & place) {
    check_params(target, given);
    const Planner planner = {target, drafter, find_site(target, place)};
    const bool open_context = given.n_ctx == 0;
    pf_session_params p = given;
    p.n_ctx = open_context ? target.n_ctx_train : given.n_ctx;
    if (p.budget == PF_BUDGET_AUTO) {
        p.budget = drafter ? PF_MAX_NODES - 1 : 0;
    }

    std::vector<ggml_type> types; // f16 divides everything, so there is one
    for (const ggml_type type : {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
        if (divides(target, type)) {
            types.push_back(type);
        }
    }
    if (given.type_k != -1 && given.type_v != -1) {
        types.resize(1);
    }
    Plan plan;
    for (const ggml_type type : types) {
        p.type_k = given.type_k == -1 ? type : given.type_k;
        p.type_v = given.type_v == -1 ? type : given.type_v;
        plan = planner.at(p);
        // What was asked for may use all there is; what is chosen leaves some, while there is another choice.
        plan.fits = open_context || type != types.back() ? fits_with_room(plan) : plan.fits;
        if (plan.fits) {
            break;
        }
    }
    if (!plan.fits && open_context) {
        p.n_ctx = std::max(1, largest_context(planner, plan.params));
        p.type_k = plan.params.type_k;
        p.type_v = plan.params.type_v;
        plan = planner.at(p);
    }
    if (!plan.fits) {
        plan.advice = advise(planner, plan);
    }
    return plan;
}

Plan require_plan(const Target & target, const Drafter * drafter, const pf_session_params & params) {
    Plan plan = make_plan(target, drafter, params);
    if (!plan.fits) {
        throw Error(PF_ERR_MEMORY, "a context of " + std::to_string(plan.params.n_ctx) + " tokens takes " +
                                       mib(plan.total) + ", but " + mib(plan.free) + " are free:\n" + plan.table() +
                                       plan.advice);
    }
    return plan;
}

} // namespace pf
