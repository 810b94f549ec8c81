#include "state.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "error.h"
#include "ggml-tree.h"

// A library built with -DPF_ROTATE_KV=0 shows what the rotation is worth (scripts/long_context.py kv): for measuring only.
#ifndef PF_ROTATE_KV
#define PF_ROTATE_KV 1
#endif

namespace pf {

namespace {

int64_t largest_power_of_two_divisor(int64_t n) {
    return n & -n;
}

// Orthonormal Walsh-Hadamard matrix, H[i][j] = (-1)^popcount(i & j) / sqrt(n).
void fill_hadamard(ggml_tensor * t) {
    const int64_t n = t->ne[0];
    std::vector<float> h((size_t) n * n);
    const float scale = 1.0f / std::sqrt((float) n);
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
            h[(size_t) (i * n + j)] = __builtin_parityll((unsigned long long) (i & j)) ? -scale : scale;
        }
    }
    ggml_backend_tensor_set(t, h.data(), 0, h.size() * sizeof(float));
}

} // namespace

ggml_tensor * rotate(const GraphBuilder & b, ggml_tensor * hadamard, ggml_tensor * x) {
    const int64_t n = hadamard->ne[0];
    ggml_tensor * flat =
        ggml_reshape_2d(b.ctx, ggml_is_contiguous(x) ? x : ggml_cont(b.ctx, x), n, ggml_nelements(x) / n);
    ggml_tensor * y = ggml_mul_mat(b.ctx, hadamard, flat);
    ggml_mul_mat_set_hint(y, GGML_HINT_SRC0_IS_HADAMARD);
    return ggml_reshape_4d(b.ctx, y, x->ne[0], x->ne[1], x->ne[2], x->ne[3]);
}

State::State(const StateShape & shape_in, const StateParams & params_in, const Memory & memory)
    : shape(shape_in), params(params_in), memory_(memory) {
    n_rows = round_up(params.n_ctx + PF_MAX_NODES, kv_granule);
    rotate_k = PF_ROTATE_KV && params.type_k == GGML_TYPE_Q4_0;
    rotate_v = PF_ROTATE_KV && params.type_v == GGML_TYPE_Q4_0;

    const int64_t n_kv_row = (int64_t) shape.head_dim * shape.n_head_kv;
    if (shape.n_attn > 0) {
        kv_ = TensorBlock((size_t) shape.n_attn * 2 + 2);
        for (int i = 0; i < shape.n_attn; ++i) {
            k.push_back(kv_.add(params.type_k, n_kv_row, n_rows));
            v.push_back(kv_.add(params.type_v, n_kv_row, n_rows));
        }
        if (rotate_k) {
            const int64_t n = largest_power_of_two_divisor(shape.head_dim);
            hadamard_k = kv_.add(GGML_TYPE_F32, n, n);
        }
        if (rotate_v) {
            const int64_t n = std::min<int64_t>(64, largest_power_of_two_divisor(shape.head_dim));
            hadamard_v = kv_.add(GGML_TYPE_F32, n, n);
        }
        kv_.allocate(memory, "the KV cache");
    }
    if (shape.n_recurrent > 0) {
        recurrent_ = TensorBlock((size_t) shape.n_recurrent * 2);
        for (int i = 0; i < shape.n_recurrent; ++i) {
            s.push_back(recurrent_.add(GGML_TYPE_F32, shape.d_key, shape.d_value, shape.n_value_heads));
            conv.push_back(recurrent_.add(GGML_TYPE_F32, shape.channels, shape.conv_width - 1));
        }
        recurrent_.allocate(memory, "the recurrent state");
    }
    if (params.n_taps > 0) {
        features_ = TensorBlock(1);
        features = features_.add(params.type_features, (int64_t) params.n_taps * shape.n_embd, params.n_features);
        features_.allocate(memory, "the features of a pass");
    }
    if (hadamard_k && !memory.planned) {
        fill_hadamard(hadamard_k);
    }
    if (hadamard_v && !memory.planned) {
        fill_hadamard(hadamard_v);
    }
}

void State::reserve_tree(int n_nodes) {
    TensorBlock block((size_t) shape.n_recurrent * 4);
    std::vector<ggml_tensor *> new_k, new_delta, new_g, new_x;
    for (int i = 0; i < shape.n_recurrent; ++i) {
        new_k.push_back(block.add(GGML_TYPE_F32, (int64_t) shape.d_key * shape.n_key_heads, n_nodes));
        new_delta.push_back(block.add(GGML_TYPE_F32, (int64_t) shape.d_value * shape.n_value_heads, n_nodes));
        new_g.push_back(block.add(GGML_TYPE_F32, shape.n_value_heads, n_nodes));
        new_x.push_back(block.add(GGML_TYPE_F32, shape.channels, n_nodes));
    }
    if (shape.n_recurrent > 0) {
        block.allocate(memory_, "the scratch of verified trees");
    }
    scratch_ = std::move(block);
    tree_k = std::move(new_k);
    tree_delta = std::move(new_delta);
    tree_g = std::move(new_g);
    tree_x = std::move(new_x);
    max_nodes = n_nodes;
}

void State::clear() {
    for (size_t i = 0; i < s.size(); ++i) {
        ggml_backend_tensor_memset(s[i], 0, 0, ggml_nbytes(s[i]));
        ggml_backend_tensor_memset(conv[i], 0, 0, ggml_nbytes(conv[i]));
    }
}

void State::save_tree(const GraphBuilder & b, int layer, ggml_tensor * x, ggml_tensor * key, ggml_tensor * delta,
                      ggml_tensor * g) const {
    const int64_t n = x->ne[1];
    const auto save = [&](ggml_tensor * from, ggml_tensor * to) {
        b.keep(ggml_cpy(b.ctx, from, ggml_view_2d(b.ctx, to, to->ne[0], n, to->nb[1], 0)));
    };
    save(x, tree_x[layer]);
    save(ggml_reshape_2d(b.ctx, ggml_cont(b.ctx, key), tree_k[layer]->ne[0], n), tree_k[layer]);
    save(ggml_reshape_2d(b.ctx, delta, tree_delta[layer]->ne[0], n), tree_delta[layer]);
    save(g, tree_g[layer]);
}

void State::commit_recurrent(const GraphBuilder & b, int layer, ggml_tensor * x, ggml_tensor * key, ggml_tensor * delta,
                             ggml_tensor * g, const CommitInputs & in) const {
    b.keep(ggml_gated_delta_net_tree_persist(b.ctx, s[layer], key, delta, g, in.path));
    b.keep(ggml_ssm_conv_tree_persist(b.ctx, conv[layer], x, in.path));
}

void State::commit_tree(const GraphBuilder & b, int n_nodes, const CommitInputs & in) const {
    const int64_t n = n_nodes;
    for (int i = 0; i < shape.n_recurrent; ++i) {
        const auto view3 = [&](ggml_tensor * t, int64_t d, int64_t heads) {
            return ggml_view_3d(b.ctx, t, d, heads, n, (size_t) d * sizeof(float), t->nb[1], 0);
        };
        commit_recurrent(b, i, ggml_view_2d(b.ctx, tree_x[i], shape.channels, n, tree_x[i]->nb[1], 0),
                         view3(tree_k[i], shape.d_key, shape.n_key_heads),
                         view3(tree_delta[i], shape.d_value, shape.n_value_heads),
                         ggml_view_2d(b.ctx, tree_g[i], shape.n_value_heads, n, tree_g[i]->nb[1], 0), in);
    }
    const auto move = [&](ggml_tensor * t, ggml_tensor * from, ggml_tensor * to) {
        // Through F32 and back: bit-exact for every cache type.
        b.keep(ggml_set_rows(b.ctx, t, ggml_get_rows(b.ctx, t, from), to));
    };
    if (in.kv_from) {
        for (int i = 0; i < shape.n_attn; ++i) {
            move(k[i], in.kv_from, in.kv_to);
            move(v[i], in.kv_from, in.kv_to);
        }
    }
}

} // namespace pf
