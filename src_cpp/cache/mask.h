// The attention mask of a pass, kept where the backend reads it. Node i sees every committed row and, among the rows the
// pass itself writes, its ancestors and itself. From one step to the next only the columns that changed are written.
#pragma once

#include <cstdint>
#include <vector>

#include "tensor_block.h"

namespace pf {

class Mask {
  public:
    // Room for any mask of at most max_elements = n_kv * N half-precision entries.
    Mask(int64_t max_elements, ggml_backend_t backend);
    Mask(const Mask &) = delete;
    Mask & operator=(const Mask &) = delete;

    // The tensor of one graph's mask, [n_kv, n_nodes] f16 over the shared memory.
    ggml_tensor * view(ggml_context * ctx, int64_t n_kv, int64_t n_nodes) const;
    // Rows [0, n_committed) are open; row n_committed + j belongs to node j. parent is [n_nodes], -1 for the root and
    // for pads, which see only themselves and what is committed.
    void write(ggml_tensor * mask, int64_t n_committed, const int32_t * parent);
    void forget(); // the next write fills everything

  private:
    TensorBlock block_{1};
    ggml_tensor * memory_ = nullptr;
    int64_t n_kv_ = 0; // shape and committed length of what the memory holds; 0: nothing
    int64_t n_nodes_ = 0;
    int64_t n_committed_ = 0;
    std::vector<ggml_fp16_t> row_;
};

} // namespace pf
