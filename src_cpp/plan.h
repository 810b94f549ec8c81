// What a session takes, row by row, before it takes it, and the choice of a context and a KV type that fit. The plan is
// the session's own caches and graphs, built over no memory and measured by ggml's own allocator: what it says of them is
// what is then allocated, to the byte. What ggml keeps for itself is estimated, and marked so.
//
// Reads file headers only, of models opened on the CPU; refuses what can't fit before anything is allocated.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/drafter.h"
#include "model/target.h"
#include "pydflash.h"

namespace pf {

struct Caches;

struct Plan {
    struct Row {
        const char * name;
        int32_t kind; // PF_ROW_*
        uint64_t n_bytes;
    };

    pf_session_params params = {}; // settled: the context and the KV types are chosen
    bool on_cuda = false;
    std::vector<Row> rows;
    uint64_t total = 0; // of the rows that count
    uint64_t free = 0;  // memory to fit into
    bool fits = false;  // into all of `free`; with a twentieth of it to spare where there was a choice
    std::string advice; // what would fit; empty when it fits

    uint64_t operator[](const char * name) const;
    std::string table() const;
};

// Where to plan for. A CUDA card of so many bytes can be planned for wherever the target was opened.
struct PlanPlace {
    std::string device; // "cpu", "cuda"; empty: the target's own, with its weights loaded
    uint64_t free = 0;  // bytes; 0: what the device has free now
};

// Plans a session, choosing what params leave open so that a twentieth of the memory stays free: n_ctx 0 is the largest
// context with which it does, KV types -1 the first of f16, q8_0 and q4_0 (q4_0 may use all there is). drafter may be
// null. Throws PF_ERR_ARGUMENT or PF_ERR_UNSUPPORTED for what no session can be.
Plan make_plan(const Target & target, const Drafter * drafter, const pf_session_params & params,
               const PlanPlace & place = {});

// The same, where it fits; throws PF_ERR_MEMORY with the table and what would fit.
Plan require_plan(const Target & target, const Drafter * drafter, const pf_session_params & params);

// Graphs that are kept for shapes to come again: planned for as many as may be, of the largest.
constexpr const char * kept_graphs_row = "kept graphs, on the host";

// The rows of a session's caches, planned or allocated.
std::vector<Plan::Row> cache_rows(const Caches & caches);

} // namespace pf
