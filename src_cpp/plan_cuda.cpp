#include "plan_cuda.h"

#include <map>
#include <mutex>

#include "ggml-backend-impl.h"

namespace pf {

namespace {

constexpr size_t alignment = 128;
// A quantised tensor whose rows are not whole runs of so many values has room for its last row to be read as if they were.
constexpr int64_t row_padding = 512;

size_t cuda_size(ggml_backend_buffer_type_t, const ggml_tensor * t) {
    size_t size = ggml_nbytes(t);
    if (ggml_is_quantized(t->type) && t->ne[0] % row_padding != 0) {
        size += ggml_row_size(t->type, row_padding - t->ne[0] % row_padding);
    }
    // A single query is answered from the cache as it is; the largest graph of every kind has several.
    if (t->op == GGML_OP_FLASH_ATTN_EXT) {
        for (int i = 1; i <= 2; ++i) {
            if (t->src[i]->type != GGML_TYPE_F16) {
                size = GGML_PAD(size, alignment) + (size_t) ggml_nelements(t->src[i]) * sizeof(ggml_fp16_t);
            }
        }
    }
    return size;
}

ggml_backend_buffer_type_t base(ggml_backend_buffer_type_t type) {
    return static_cast<ggml_backend_buffer_type_t>(type->context);
}

ggml_backend_buffer_type memoryless() {
    ggml_backend_buffer_type type = {};
    type.iface.get_name = [](ggml_backend_buffer_type_t) { return "planned"; };
    type.iface.alloc_buffer = [](ggml_backend_buffer_type_t, size_t) { return ggml_backend_buffer_t(nullptr); };
    return type;
}

} // namespace

ggml_backend_buffer_type_t cuda_plan_type() {
    static ggml_backend_buffer_type type = [] {
        ggml_backend_buffer_type cuda = memoryless();
        cuda.iface.get_alignment = [](ggml_backend_buffer_type_t) { return alignment; };
        cuda.iface.get_alloc_size = cuda_size;
        return cuda;
    }();
    return &type;
}

ggml_backend_buffer_type_t without_copies(ggml_backend_buffer_type_t type) {
    static std::mutex mutex;
    static std::map<ggml_backend_buffer_type_t, ggml_backend_buffer_type> types; // a handful, one a device
    const std::lock_guard<std::mutex> lock(mutex);
    const auto [found, is_new] = types.try_emplace(type, memoryless());
    if (is_new) {
        ggml_backend_buffer_type & plain = found->second;
        plain.context = type;
        plain.iface.get_alignment = [](ggml_backend_buffer_type_t t) {
            return ggml_backend_buft_get_alignment(base(t));
        };
        plain.iface.get_alloc_size = [](ggml_backend_buffer_type_t t, const ggml_tensor * tensor) {
            return tensor->op == GGML_OP_FLASH_ATTN_EXT ? ggml_nbytes(tensor)
                                                        : ggml_backend_buft_get_alloc_size(base(t), tensor);
        };
    }
    return &found->second;
}

} // namespace pf
