#include "tensor_block.h"

#include <string>

#include "error.h"
#include "ggml-alloc.h"
#include "host_memory.h"

namespace pf {

TensorBlock::TensorBlock(size_t n_tensors)
    : ctx_(ggml_init({ggml_tensor_overhead() * (n_tensors + 1), nullptr, true})) {
    if (!ctx_) {
        throw Error(PF_ERR_MEMORY, "no memory for a table of tensors");
    }
}

TensorBlock::~TensorBlock() {
    ggml_backend_buffer_free(buffer_);
    unmap_pages(pages_);
    ggml_free(ctx_);
}

TensorBlock & TensorBlock::operator=(TensorBlock && other) noexcept {
    std::swap(ctx_, other.ctx_);
    std::swap(buffer_, other.buffer_);
    std::swap(pages_, other.pages_);
    std::swap(n_bytes_, other.n_bytes_);
    return *this;
}

ggml_tensor * TensorBlock::add(ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2) {
    return ggml_new_tensor_3d(ctx_, type, ne0, ne1, ne2);
}

// A long context costs nothing to open.
void TensorBlock::allocate_pages() {
    pages_ = map_pages(n_bytes_);
    if (!pages_) {
        return;
    }
    buffer_ = ggml_backend_cpu_buffer_from_ptr(pages_, n_bytes_);
    ggml_tallocr place = ggml_tallocr_new(buffer_);
    for (ggml_tensor * t = ggml_get_first_tensor(ctx_); t; t = ggml_get_next_tensor(ctx_, t)) {
        ggml_tallocr_alloc(&place, t);
    }
}

void TensorBlock::allocate(const Memory & memory, const char * what) {
    n_bytes_ = ggml_backend_alloc_ctx_tensors_from_buft_size(ctx_, memory.type);
    if (memory.planned) {
        buffer_ = ggml_backend_buft_alloc_buffer(memory.type, 0);
        for (ggml_tensor * t = ggml_get_first_tensor(ctx_); t; t = ggml_get_next_tensor(ctx_, t)) {
            t->buffer = buffer_; // to the graph allocator a tensor that has its place
        }
        return;
    }
    // Masked rows are multiplied by a weight of zero: they must hold numbers.
    if (memory.type == ggml_backend_cpu_buffer_type()) {
        allocate_pages();
    } else if ((buffer_ = ggml_backend_alloc_ctx_tensors_from_buft(ctx_, memory.type))) {
        ggml_backend_buffer_clear(buffer_, 0);
    }
    if (!buffer_) {
        throw Error(PF_ERR_MEMORY,
                    std::string(what) + " need " + std::to_string(n_bytes_ >> 20) +
                        " MiB, which this machine would not give; ask for a smaller n_ctx, n_batch or n_ring, "
                        "or a smaller kv_type");
    }
}

} // namespace pf
