#include "plan_cuda.h"

#include "ggml-backend-impl.h"

namespace pf {

namespace {

constexpr size_t alignment = 128;
// A quantised tensor whose rows are not whole runs of so many values has room for its last row to be read as if they were.
constexpr int64_t row_padding = 512;

size_t plain_size(ggml_backend_buffer_type_t, const ggml_tensor * t) {
    size_t size = ggml_nbytes(t);
    if (ggml_is_quantized(t->type) && t->ne[0] % row_padding != 0) {
        size += ggml_row_size(t->type, row_padding - t->ne[0] % row_padding);
    }
    return size;
}

// One query at a time is answered from the cache as it is, several from a copy: taken here for all, as the largest graph
// of every kind has several.
size_t size_with_copy(ggml_backend_buffer_type_t type, const ggml_tensor * t) {
    size_t size = plain_size(type, t);
    if (t->op == GGML_OP_FLASH_ATTN_EXT) {
        for (int i = 1; i <= 2; ++i) {
            if (t->src[i]->type != GGML_TYPE_F16) {
                size = GGML_PAD(size, alignment) + (size_t) ggml_nelements(t->src[i]) * sizeof(ggml_fp16_t);
            }
        }
    }
    return size;
}

ggml_backend_buffer_type make(size_t (*size)(ggml_backend_buffer_type_t, const ggml_tensor *)) {
    ggml_backend_buffer_type type = {};
    type.iface.get_name = [](ggml_backend_buffer_type_t) { return "CUDA, planned"; };
    type.iface.alloc_buffer = [](ggml_backend_buffer_type_t, size_t) { return ggml_backend_buffer_t(nullptr); };
    type.iface.get_alignment = [](ggml_backend_buffer_type_t) { return alignment; };
    type.iface.get_alloc_size = size;
    return type;
}

} // namespace

ggml_backend_buffer_type_t cuda_plan_type(bool with_copy) {
    static ggml_backend_buffer_type types[] = {make(plain_size), make(size_with_copy)};
    return &types[with_copy];
}

} // namespace pf
