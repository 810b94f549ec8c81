// Tensors that outlive graphs: what a session remembers lives in blocks of these.
#pragma once

#include <cstdint>
#include <utility>

#include "ggml-backend.h"

namespace pf {

// Tensors that live in one buffer of their own.
class TensorBlock {
  public:
    TensorBlock() = default;
    explicit TensorBlock(size_t n_tensors); // room for so many
    ~TensorBlock();
    TensorBlock(TensorBlock && other) noexcept { *this = std::move(other); }
    TensorBlock & operator=(TensorBlock && other) noexcept;

    ggml_tensor * add(ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2 = 1);
    // Zeroed memory for all of them; `what` begins the sentence when there is none.
    void allocate(ggml_backend_t backend, const char * what);
    uint64_t n_bytes() const { return buffer_ ? ggml_backend_buffer_get_size(buffer_) : 0; }

  private:
    ggml_context * ctx_ = nullptr;
    ggml_backend_buffer_t buffer_ = nullptr;
};

} // namespace pf
