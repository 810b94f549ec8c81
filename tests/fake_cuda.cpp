// A device for tests: it computes with the CPU backend, on memory of its own that nobody else can touch.
//
// Stands in for libpydflash-ggml-cuda.so, to show on a machine without a GPU that a session runs on a device whose memory
// is not the host's. All of that memory is inaccessible except while ggml copies into it, out of it, or computes: one
// read or write through tensor->data anywhere else ends the process. Bytes and calls that cross are counted, and runs of
// graphs that CUDA could replay from a recording: those that it is told are what they were, and that are.
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

// What the real library takes, where a test has linked it in (tests/cuda_emulator/supports.py).
extern "C" bool cuda_supports_op(const ggml_tensor * op) __attribute__((weak));

namespace {

struct Traffic {
    uint64_t set_calls, set_bytes, get_calls, get_bytes, graphs, allocations, allocated_bytes;
} traffic;

// ---- memory ------------------------------------------------------------------------------------------------------

struct Memory {
    void * base;
    size_t size;
};
std::set<Memory *> memories;

struct Unlocked {
    Unlocked() { protect(PROT_READ | PROT_WRITE); }
    ~Unlocked() { protect(PROT_NONE); }
    static void protect(int access) {
        for (const Memory * m : memories) {
            if (mprotect(m->base, m->size, access) != 0) {
                abort();
            }
        }
    }
};

Memory * memory(ggml_backend_buffer_t buffer) {
    return static_cast<Memory *>(buffer->context);
}

void free_buffer(ggml_backend_buffer_t buffer) {
    munmap(memory(buffer)->base, memory(buffer)->size);
    memories.erase(memory(buffer));
    delete memory(buffer);
}

void * get_base(ggml_backend_buffer_t buffer) {
    return memory(buffer)->base;
}

void memset_tensor(ggml_backend_buffer_t, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    const Unlocked unlocked;
    memset(static_cast<char *>(t->data) + offset, value, size);
}

void set_tensor(ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    const Unlocked unlocked;
    memcpy(static_cast<char *>(t->data) + offset, data, size);
    ++traffic.set_calls;
    traffic.set_bytes += size;
}

void get_tensor(ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    const Unlocked unlocked;
    memcpy(data, static_cast<const char *>(t->data) + offset, size);
    ++traffic.get_calls;
    traffic.get_bytes += size;
}

bool copy_tensor(ggml_backend_buffer_t, const ggml_tensor * from, ggml_tensor * to) {
    if (from->buffer->iface.get_base != get_base) {
        return false;
    }
    const Unlocked unlocked;
    memcpy(to->data, from->data, ggml_nbytes(from));
    return true;
}

void clear(ggml_backend_buffer_t buffer, uint8_t value) {
    const Unlocked unlocked;
    memset(memory(buffer)->base, value, memory(buffer)->size);
}

size_t free_bytes() {
    const char * mib = getenv("FAKE_CUDA_FREE_MIB");
    return (mib ? strtoull(mib, nullptr, 10) : 1024) << 20;
}

const char * buffer_type_name(ggml_backend_buffer_type_t) {
    return "Fake";
}

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    const size_t whole = (size + 4096) / 4096 * 4096;
    void * base = mmap(nullptr, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || size > free_bytes()) {
        return nullptr;
    }
    auto * m = new Memory{base, whole};
    memories.insert(m);
    ++traffic.allocations;
    traffic.allocated_bytes += size;
    ggml_backend_buffer_i iface = {};
    iface.free_buffer = free_buffer;
    iface.get_base = get_base;
    iface.memset_tensor = memset_tensor;
    iface.set_tensor = set_tensor;
    iface.get_tensor = get_tensor;
    iface.cpy_tensor = copy_tensor;
    iface.clear = clear;
    return ggml_backend_buffer_init(type, iface, m, size);
}

size_t alignment(ggml_backend_buffer_type_t) {
    return 128; // as CUDA's
}

// ---- the backend -------------------------------------------------------------------------------------------------

ggml_backend_t cpu(ggml_backend_t backend) {
    return static_cast<ggml_backend_t>(backend->context);
}

const char * backend_name(ggml_backend_t) {
    return "Fake";
}

void free_backend(ggml_backend_t backend) {
    ggml_backend_free(cpu(backend));
    delete backend;
}

// ggml-cuda records a graph under its first node, and takes its uid for the promise that nothing in it has changed.
struct Replays {
    uint64_t recorded, replayed, unsealed, changed;
} replays;

uint64_t digest(const ggml_cgraph * graph) {
    uint64_t hash = 1469598103934665603u; // FNV-1a
    const auto add = [&](const void * data, size_t size) {
        for (size_t i = 0; i < size; ++i) {
            hash = (hash ^ static_cast<const uint8_t *>(data)[i]) * 1099511628211u;
        }
    };
    for (int i = 0; i < graph->n_nodes; ++i) {
        const ggml_tensor * node = graph->nodes[i];
        add(node, sizeof *node);
        for (const ggml_tensor * src : node->src) {
            if (src) {
                add(&src->data, sizeof src->data);
                add(src->ne, sizeof src->ne);
                add(src->nb, sizeof src->nb);
            }
        }
    }
    return hash;
}

void record(const ggml_cgraph * graph) {
    struct Record {
        uint64_t uid, digest;
    };
    static std::map<const void *, Record> records;
    const Record now = {graph->uid, digest(graph)};
    const auto known = records.find(graph->nodes[0]);
    if (now.uid == 0) {
        ++replays.unsealed;
    } else if (known == records.end() || known->second.uid != now.uid) {
        ++replays.recorded;
    } else {
        ++(known->second.digest == now.digest ? replays.replayed : replays.changed);
    }
    records[graph->nodes[0]] = now;
}

ggml_status graph_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    const Unlocked unlocked;
    ++traffic.graphs;
    record(graph);
    return ggml_backend_graph_compute(cpu(backend), graph);
}

// ---- the device --------------------------------------------------------------------------------------------------

ggml_backend_dev_t cpu_device() {
    return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

const char * device_name(ggml_backend_dev_t) {
    return "CUDA0";
}

const char * device_description(ggml_backend_dev_t) {
    return "Fake GPU";
}

void device_memory(ggml_backend_dev_t, size_t * free, size_t * total) {
    *free = free_bytes();
    *total = size_t{2048} << 20;
}

enum ggml_backend_dev_type device_type(ggml_backend_dev_t) {
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}

void device_props(ggml_backend_dev_t device, ggml_backend_dev_props * props) {
    *props = {};
    props->name = device_name(device);
    props->description = device_description(device);
    props->type = device_type(device);
    device_memory(device, &props->memory_free, &props->memory_total);
}

ggml_backend_t init_backend(ggml_backend_dev_t device, const char *) {
    static uint8_t guid[16] = "a fake CUDA one";
    ggml_backend_i iface = {};
    iface.get_name = backend_name;
    iface.free = free_backend;
    iface.graph_compute = graph_compute;
    ggml_backend_t cpu = ggml_backend_dev_init(cpu_device(), nullptr);
    const auto set_n_threads = reinterpret_cast<ggml_backend_set_n_threads_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu_device()), "ggml_backend_set_n_threads"));
    set_n_threads(cpu, 1); // several would spin for each other on a busy machine
    return new ggml_backend{&guid, iface, device, cpu};
}

ggml_backend_buffer_type_t buffer_type(ggml_backend_dev_t device) {
    static ggml_backend_buffer_type type = {
        {buffer_type_name, alloc_buffer, alignment, nullptr, nullptr, nullptr}, device, nullptr};
    return &type;
}

bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    const char * lacks = getenv("FAKE_CUDA_LACKS");
    return (!cuda_supports_op || cuda_supports_op(op)) && !(lacks && strcmp(lacks, ggml_op_name(op->op)) == 0) &&
           ggml_backend_dev_supports_op(cpu_device(), op);
}

bool supports_buffer_type(ggml_backend_dev_t device, ggml_backend_buffer_type_t type) {
    return type == buffer_type(device);
}

// ---- the registry ------------------------------------------------------------------------------------------------

const char * registry_name(ggml_backend_reg_t) {
    return "CUDA";
}

size_t device_count(ggml_backend_reg_t) {
    if (getenv("FAKE_CUDA_NO_DEVICE")) {
        GGML_LOG_ERROR("no CUDA-capable device is detected\n");
        return 0;
    }
    return 1;
}

ggml_backend_dev_t get_device(ggml_backend_reg_t registry, size_t) {
    static ggml_backend_device device = {{}, registry, nullptr};
    ggml_backend_device_i & iface = device.iface;
    iface.get_name = device_name;
    iface.get_description = device_description;
    iface.get_memory = device_memory;
    iface.get_type = device_type;
    iface.get_props = device_props;
    iface.init_backend = init_backend;
    iface.get_buffer_type = buffer_type;
    iface.supports_op = supports_op;
    iface.supports_buft = supports_buffer_type;
    return &device;
}

void * get_proc_address(ggml_backend_reg_t, const char *) {
    return nullptr;
}

} // namespace

extern "C" ggml_backend_reg_t ggml_backend_init() {
    static ggml_backend_reg registry = {
        GGML_BACKEND_API_VERSION, {registry_name, device_count, get_device, get_proc_address}, nullptr};
    return &registry;
}

extern "C" const char * pydflash_cuda_unfit(int) {
    return getenv("FAKE_CUDA_UNFIT");
}

extern "C" void fake_cuda_traffic(Traffic * out) {
    *out = traffic;
}

extern "C" void fake_cuda_replays(Replays * out) {
    *out = replays;
}
