// Tensors that outlive graphs: what a session remembers lives in blocks of these.
#pragma once

#include <cstdint>
#include <utility>

#include "ggml-backend.h"

namespace pf {

// Where tensors go. Planned memory is none: tensors have their shapes, and graphs over them can be built and measured.
struct Memory {
    ggml_backend_buffer_type_t type;
    bool planned = false;
};

// Cache rows and the views that graphs take of them grow in these steps, so that graphs repeat.
constexpr int64_t kv_granule = 256;

constexpr int64_t round_up(int64_t n, int64_t step) {
    return (n + step - 1) / step * step;
}

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
    void allocate(const Memory & memory, const char * what);
    uint64_t n_bytes() const { return n_bytes_; } // allocated or planned

  private:
    void allocate_pages(); // none: there is no buffer then

    ggml_context * ctx_ = nullptr;
    ggml_backend_buffer_t buffer_ = nullptr;
    void * pages_ = nullptr; // of the host, which the buffer lies in; null: it brought its own memory
    uint64_t n_bytes_ = 0;
};

} // namespace pf
