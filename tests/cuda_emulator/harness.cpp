// Runs one graph node through the CUDA backend's own dispatch, with host memory for the device's.
//
// Owns: the device memory of the node's operands (each in an allocation of exactly its own size, so that a store or a load
// beyond it is found: by canaries, or by the address sanitizer), and the few functions of ggml-cuda.cu that the tree ops
// call. The result is NaN at first. Returns what went wrong as a sentence: a Fault of the emulator, a canary overwritten,
// an operand changed that was only to be read.
#include "tree-ops.cuh"

#include <algorithm>
#include <map>
#include <memory>

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t canary_size = 0; // the sanitizer sees the end of an allocation to the byte
#else
constexpr size_t canary_size = 256;
#endif
constexpr unsigned char canary = 0xa5;

// An allocation as another device sees it (emulator_on_other_device).
struct Allocation {
    const void * data;
    size_t n;
    bool given, writable; // has content; may be written
};
std::map<const void *, Allocation> allocations;

class DeviceMemory {
  public:
    // where: an address whose place within 64 bytes the memory is to have too
    explicit DeviceMemory(size_t n, const void * where = nullptr)
        : n_(n), before_(canary_size + (uintptr_t) where % 64) {
        void * bytes = nullptr;
        if (posix_memalign(&bytes, 64, before_ + n + canary_size) != 0) {
            throw emulator::Fault("no memory for an operand");
        }
        bytes_ = (char *) bytes;
        memset(bytes_, canary, before_);
        memset(data(), 0xff, n);
        memset(data() + n, canary, canary_size);
        allocations[data()] = {data(), n, false, true};
    }
    ~DeviceMemory() {
        allocations.erase(data());
        std::free(bytes_);
    }
    DeviceMemory(const DeviceMemory &) = delete;

    char * data() const { return bytes_ + before_; }

    bool intact() const {
        const auto is_canary = [](char c) { return (unsigned char) c == canary; };
        return std::all_of(bytes_, data(), is_canary) && std::all_of(data() + n_, data() + n_ + canary_size, is_canary);
    }

  private:
    size_t n_, before_;
    char * bytes_;
};

struct Pool : ggml_cuda_pool {
    std::map<void *, std::unique_ptr<DeviceMemory>> pieces;

    void * alloc(size_t size, size_t * actual_size) override {
        auto piece = std::make_unique<DeviceMemory>(size);
        void * p = piece->data();
        *actual_size = size;
        pieces[p] = std::move(piece);
        return p;
    }
    void free(void * p, size_t) override {
        if (!pieces.at(p)->intact()) {
            throw emulator::Fault("a kernel wrote beyond its scratch from the pool");
        }
        pieces.erase(p);
    }
};

std::string sentence;

void compute(ggml_tensor * node) {
    // the node on the device: a copy whose operands point to device memory
    ggml_tensor copy = *node;
    ggml_tensor operands[GGML_MAX_SRC];
    std::unique_ptr<DeviceMemory> memory[GGML_MAX_SRC];
    std::unique_ptr<DeviceMemory> result;
    ggml_tensor * in_place = nullptr;
    for (int i = 0; i < GGML_MAX_SRC && node->src[i]; ++i) {
        const size_t n = ggml_nbytes(node->src[i]);
        memory[i] = std::make_unique<DeviceMemory>(n, node->src[i]->data);
        memcpy(memory[i]->data(), node->src[i]->data, n);
        operands[i] = *node->src[i];
        operands[i].data = memory[i]->data();
        copy.src[i] = &operands[i];
        allocations[operands[i].data].given = true;
        allocations[operands[i].data].writable = false;
        if (node->view_src && node->src[i]->data == node->data) {
            in_place = node->src[i];
            copy.data = operands[i].data;
            allocations[copy.data].writable = true;
        }
    }
    if (!in_place) {
        result = std::make_unique<DeviceMemory>(ggml_nbytes(node), node->data);
        copy.data = result->data();
    }
    ggml_backend_cuda_context context(0);
    ggml_cuda_tree_op(context, &copy);

    for (int i = 0; i < GGML_MAX_SRC && node->src[i]; ++i) {
        const std::string name = "operand " + std::to_string(i);
        if (!memory[i]->intact()) {
            throw emulator::Fault("a kernel wrote beside " + name);
        }
        if (node->src[i] != in_place && memcmp(memory[i]->data(), node->src[i]->data, ggml_nbytes(node->src[i])) != 0) {
            throw emulator::Fault("a kernel wrote to " + name);
        }
    }
    if (result && !result->intact()) {
        throw emulator::Fault("a kernel wrote beside its result");
    }
    memcpy(node->data, copy.data, ggml_nbytes(node));
}

} // namespace

extern "C" bool emulator_supports(const ggml_tensor * node) {
    return ggml_cuda_tree_op_supported(node);
}

extern "C" const char * emulator_compute(ggml_tensor * node, int order, uint64_t seed) {
    try {
        emulator::set_order((emulator::Order) order, seed);
        compute(node);
        return nullptr;
    } catch (const std::exception & error) {
        sentence = error.what();
        return sentence.c_str();
    }
}

// Launches go to `device` until this is called again, with nullptr for the fibers.
extern "C" void emulator_on_other_device(bool (*device)(const emulator::LaunchRecord &)) {
    emulator::other_device = device;
}

// The device memory that is allocated now: up to `n` of all of them. Returns how many there are.
extern "C" size_t emulator_allocations(Allocation * list, size_t n) {
    size_t i = 0;
    for (const auto & [_, allocation] : allocations) {
        if (i < n) {
            list[i] = allocation;
        }
        ++i;
    }
    return i;
}

extern "C" void emulator_drop_barrier(const char * file, int line) {
    emulator::drop_barrier(file, line);
}

// -- what ggml-cuda.cu has for the ops ---------------------------------------------------------------------------------

const ggml_cuda_device_info & ggml_cuda_info() {
    static const ggml_cuda_device_info info = [] { // an RTX 3090
        ggml_cuda_device_info i = {};
        i.device_count = i.physical_device_count = 1;
        i.devices[0].cc = GGML_CUDA_CC_AMPERE + 60;
        i.devices[0].nsm = 82;
        i.devices[0].smpb = 48 << 10;
        i.devices[0].smpbo = 99 << 10;
        i.devices[0].warp_size = 32;
        return i;
    }();
    return info;
}

int ggml_cuda_get_device() {
    return 0;
}

void ggml_cuda_set_device(int) {}

void ggml_cuda_error(const char * stmt, const char * func, const char *, int, const char * msg) {
    emulator::fail(std::string(func) + ": " + stmt + ": " + msg);
}

std::unique_ptr<ggml_cuda_pool> ggml_backend_cuda_context::new_pool_for_device(int, int) {
    return std::make_unique<Pool>();
}

ggml_backend_cuda_context::~ggml_backend_cuda_context() = default;
