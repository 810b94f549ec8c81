#include "compute.h"

#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <numeric>

#include "backend.h"
#include "error.h"
#include "ggml-tree.h"

namespace pf {

namespace {

using ThreadpoolNew = struct ggml_threadpool * (*)(struct ggml_threadpool_params *);
using ThreadpoolFree = void (*)(struct ggml_threadpool *);
using SetThreadpool = void (*)(ggml_backend_t, struct ggml_threadpool *);

size_t whole_pages(size_t n_bytes) {
    const size_t page = (size_t) sysconf(_SC_PAGESIZE);
    return (n_bytes + page - 1) / page * page;
}

} // namespace

Graph::Graph(size_t max_nodes) {
    n_bytes_ = whole_pages(ggml_tensor_overhead() * max_nodes * 2 + ggml_graph_overhead_custom(max_nodes, false));
    memory_ = mmap(nullptr, n_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory_ == MAP_FAILED) {
        throw Error(PF_ERR_MEMORY, "no memory for a compute graph");
    }
    ctx = ggml_init({n_bytes_, memory_, true});
    if (!ctx) {
        munmap(memory_, n_bytes_);
        throw Error(PF_ERR_MEMORY, "no memory for a compute graph");
    }
    gf = ggml_new_graph_custom(ctx, max_nodes, false);
}

Graph::~Graph() {
    ggml_free(ctx);
    munmap(memory_, n_bytes_);
}

void Graph::trim() {
    const size_t used = whole_pages(ggml_used_mem(ctx));
    if (used < n_bytes_) {
        munmap((char *) memory_ + used, n_bytes_ - used);
        n_bytes_ = used;
    }
}

int available_cores() {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) {
        return std::clamp(CPU_COUNT(&set), 1, GGML_MAX_N_THREADS);
    }
    return 1;
}

Compute::Compute(ggml_backend_dev_t device, int n_threads, size_t max_nodes) : max_nodes_(max_nodes) {
    backend_.reset(ggml_backend_dev_init(device, nullptr));
    if (!backend_) {
        throw Error(PF_ERR_MEMORY, std::string("the backend of ") + ggml_backend_dev_description(device) +
                                       " did not start. " + take_ggml_log());
    }
    allocator_.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend_.get())));
    if (ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU) {
        start_threads(n_threads);
    }
}

void Compute::start_threads(int n_threads) {
    if (n_threads == 0) {
        n_threads = available_cores();
    }
    const auto new_pool = (ThreadpoolNew) cpu_proc("ggml_threadpool_new");
    const auto free_pool = (ThreadpoolFree) cpu_proc("ggml_threadpool_free");
    const auto set_pool = (SetThreadpool) cpu_proc("ggml_backend_cpu_set_threadpool");
    const auto set_n_threads = (ggml_backend_set_n_threads_t) cpu_proc("ggml_backend_set_n_threads");

    // Threads of our own that stay: without a pool the backend would start and join threads in every step.
    ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
    threadpool_ = {new_pool(&params), GgmlRelease{free_pool}};
    if (!threadpool_) {
        throw Error(PF_ERR_MEMORY, "the CPU backend did not start " + std::to_string(n_threads) + " threads");
    }
    set_n_threads(backend_.get(), n_threads);
    set_pool(backend_.get(), threadpool_.get());
}

void Compute::check_ops(const Graph & graph) const {
    // A backend ends the process on an op that it cannot do.
    for (int i = 0; i < ggml_graph_n_nodes(graph.gf); ++i) {
        const ggml_tensor * op = ggml_graph_node(graph.gf, i);
        if (!ggml_backend_supports_op(backend_.get(), op)) {
            const ggml_tensor * from = op->src[0] ? op->src[0] : op;
            throw Error(PF_ERR_UNSUPPORTED,
                        std::string(ggml_backend_dev_description(ggml_backend_get_device(backend_.get()))) +
                            " has no " + ggml_op_desc(op) + " for " + ggml_type_name(from->type) + " rows of " +
                            std::to_string(from->ne[0]) + ", which this model needs; use device 'cpu'");
        }
    }
}

void Compute::reserve(Graph & graph) {
    check_ops(graph);
    if (!ggml_gallocr_reserve(allocator_.get(), graph.gf)) {
        drop_graphs();
        throw Error(PF_ERR_MEMORY, "the compute buffer did not fit into memory; ask for a smaller n_batch or n_ctx");
    }
    const uint64_t bytes = ggml_gallocr_get_buffer_size(allocator_.get(), 0);
    if (bytes != buffer_bytes_) {
        drop_graphs(); // the buffer has moved, and with it everything that graphs built before point at
        buffer_bytes_ = bytes;
        ++counters.buffers;
    }
}

void Compute::place(Graph & graph) {
    reserve(graph);
    ++counters.graphs_built;
    if (!ggml_gallocr_alloc_graph(allocator_.get(), graph.gf)) {
        throw Error(PF_ERR_INTERNAL, "a compute graph could not be placed");
    }
    ggml_graph_seal(graph.gf);
    graph.trim();
    while (graphs_.size() >= max_graphs) {
        graphs_.erase(std::min_element(graphs_.begin(), graphs_.end(), [](const auto & a, const auto & b) {
            return a.second->last_used < b.second->last_used;
        }));
    }
}

uint64_t Compute::graphs_bytes() const {
    return std::accumulate(graphs_.begin(), graphs_.end(), uint64_t{0},
                           [](uint64_t sum, const auto & kept) { return sum + kept.second->n_bytes(); });
}

void Compute::drop_graphs() {
    graphs_.clear();
}

void Compute::run(Graph & graph) {
    ++counters.graph_runs;
    const ggml_status status = ggml_backend_graph_compute(backend_.get(), graph.gf);
    if (status != GGML_STATUS_SUCCESS) {
        throw Error(PF_ERR_INTERNAL, std::string("the backend failed: ") + ggml_status_to_string(status));
    }
}

void Compute::set(ggml_tensor * t, const void * data) {
    if (t && t->buffer) {
        const size_t bytes = ggml_nbytes(t);
        ggml_backend_tensor_set(t, data, 0, bytes);
        ++counters.n_set;
        counters.bytes_set += bytes;
    }
}

void Compute::get(const ggml_tensor * t, int64_t first, int64_t n, void * out) {
    const size_t bytes = (size_t) n * t->nb[1];
    ggml_backend_tensor_get(t, out, (size_t) first * t->nb[1], bytes);
    ++counters.n_get;
    counters.bytes_get += bytes;
}

} // namespace pf
