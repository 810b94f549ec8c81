#include "mask.h"

#include <algorithm>

namespace pf {

namespace {

const ggml_fp16_t open_entry = ggml_fp32_to_fp16(0.0f);
const ggml_fp16_t closed_entry = 0xfc00; // -infinity

} // namespace

Mask::Mask(int64_t max_elements, ggml_backend_t backend) : memory_(block_.add(GGML_TYPE_F16, max_elements, 1)) {
    block_.allocate(backend, "the attention mask");
}

ggml_tensor * Mask::view(ggml_context * ctx, int64_t n_kv, int64_t n_nodes) const {
    return ggml_view_2d(ctx, memory_, n_kv, n_nodes, (size_t) n_kv * sizeof(ggml_fp16_t), 0);
}

void Mask::forget() {
    n_kv_ = 0;
}

void Mask::write(ggml_tensor * mask, int64_t n_committed, const int32_t * parent) {
    const int64_t n_kv = mask->ne[0];
    const int64_t n_nodes = mask->ne[1];
    const bool grown = n_kv == n_kv_ && n_nodes == n_nodes_ && n_committed >= n_committed_;
    // Columns before `first` are open in every row already, those behind `last` closed.
    const int64_t first = grown ? n_committed_ : 0;
    const int64_t last = grown ? n_committed + n_nodes : n_kv;
    row_.resize((size_t) std::max<int64_t>((int64_t) row_.size(), n_kv));

    for (int64_t i = 0; i < n_nodes; ++i) {
        std::fill(row_.begin(), row_.begin() + (n_committed - first), open_entry);
        std::fill(row_.begin() + (n_committed - first), row_.begin() + (last - first), closed_entry);
        for (int64_t j = i; j >= 0; j = parent[j]) {
            row_[(size_t) (n_committed - first + j)] = open_entry;
        }
        ggml_backend_tensor_set(mask, row_.data(), (size_t) (i * n_kv + first) * sizeof(ggml_fp16_t),
                                (size_t) (last - first) * sizeof(ggml_fp16_t));
    }
    n_kv_ = n_kv;
    n_nodes_ = n_nodes;
    n_committed_ = n_committed;
}

} // namespace pf
