// Where graphs run: one backend with its threads, one compute buffer that all graphs of a session share, and the graphs
// themselves, built once per shape and reused. Tensors that outlive a graph's run must not live in the compute buffer.
// All that passes between host and backend in a step passes through set and get, and is counted.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "graph.h"
#include "pydflash.h"

namespace pf {

// Graphs kept; a context that grows leaves the ones of its shorter lengths behind.
constexpr size_t max_graphs = 64;

// What a graph is built for: its kind and the sizes that shape it.
using GraphKey = std::array<int64_t, 4>;

struct Graph {
    explicit Graph(size_t max_nodes); // throws PF_ERR_MEMORY
    virtual ~Graph();
    Graph(const Graph &) = delete;
    Graph & operator=(const Graph &) = delete;

    GraphBuilder builder() const { return {ctx, gf}; }

    // Host memory of the context; once built, a graph gives back what it did not fill.
    uint64_t n_bytes() const { return n_bytes_; }
    void trim();

    ggml_context * ctx = nullptr;
    ggml_cgraph * gf = nullptr;
    uint64_t last_used = 0;

  private:
    void * memory_ = nullptr; // whole pages: a tail of them can be returned, which an allocator need not do
    size_t n_bytes_ = 0;
};

// Frees what ggml gave out.
struct GgmlRelease {
    void operator()(ggml_backend_t backend) const { ggml_backend_free(backend); }
    void operator()(ggml_gallocr_t allocator) const { ggml_gallocr_free(allocator); }
    void operator()(struct ggml_threadpool * pool) const { free_pool(pool); }
    void (*free_pool)(struct ggml_threadpool *) = nullptr;
};

class Compute {
  public:
    // n_threads, of the CPU only; 0: one per core this process may run on. max_nodes: of any graph that will be built.
    Compute(ggml_backend_dev_t device, int n_threads, size_t max_nodes);
    Compute(const Compute &) = delete;
    Compute & operator=(const Compute &) = delete;

    ggml_backend_t backend() const { return backend_.get(); }

    // The graph for `key`, built by build(graph) the first time.
    template <class G, class Build>
    G & graph(const GraphKey & key, Build && build) {
        auto found = graphs_.find(key);
        if (found == graphs_.end()) {
            auto made = std::make_unique<G>(max_nodes_);
            build(*made);
            place(*made);
            found = graphs_.emplace(key, std::move(made)).first;
        }
        found->second->last_used = ++clock_;
        return static_cast<G &>(*found->second);
    }

    void run(Graph & graph); // throws PF_ERR_INTERNAL when the backend fails
    void drop_graphs();      // needed when a tensor that graphs refer to is replaced

    // Makes the compute buffer large enough for a graph that is not kept. Throws PF_ERR_MEMORY, and PF_ERR_UNSUPPORTED
    // for an op that the device cannot do.
    void reserve(Graph & graph);
    uint64_t buffer_bytes() const { return buffer_bytes_; }
    uint64_t graphs_bytes() const; // of the graphs that are kept, on the host

    // Fills all of t; does nothing for an input that the graph turned out not to use.
    void set(ggml_tensor * t, const void * data);
    // Copies rows [first, first + n) of t, which is contiguous, to `out`.
    void get(const ggml_tensor * t, int64_t first, int64_t n, void * out);

    pf_counters counters = {};

  private:
    void start_threads(int n_threads);
    void check_ops(const Graph & graph) const;
    void place(Graph & graph);

    // The pool outlives the backend that uses it.
    std::unique_ptr<struct ggml_threadpool, GgmlRelease> threadpool_;
    std::unique_ptr<ggml_backend, GgmlRelease> backend_;
    std::unique_ptr<ggml_gallocr, GgmlRelease> allocator_;
    size_t max_nodes_;
    uint64_t buffer_bytes_ = 0;
    uint64_t clock_ = 0;
    std::map<GraphKey, std::unique_ptr<Graph>> graphs_;
};

// Cores this process may run on.
int available_cores();

} // namespace pf
