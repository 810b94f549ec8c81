// Words for building ggml graphs: a builder that owns nothing, and the few layers every model here is made of.
#pragma once

#include "ggml.h"

namespace pf {

// A weight matrix as the file has it: y = W x, times `scale` where the file carries one.
struct Matrix {
    ggml_tensor * weight = nullptr; // [n_in, n_out]
    ggml_tensor * scale = nullptr;  // [1]
};

struct GraphBuilder {
    ggml_context * ctx;
    ggml_cgraph * gf;

    // Adds t to the graph now: what has side effects runs in the order of these calls.
    ggml_tensor * keep(ggml_tensor * t) const {
        ggml_build_forward_expand(gf, t);
        return t;
    }

    ggml_tensor * input(ggml_type type, int64_t ne0, int64_t ne1 = 1) const {
        ggml_tensor * t = ne1 == 1 ? ggml_new_tensor_1d(ctx, type, ne0) : ggml_new_tensor_2d(ctx, type, ne0, ne1);
        ggml_set_input(t);
        return t;
    }

    ggml_tensor * output(ggml_tensor * t) const {
        ggml_set_output(t);
        return keep(t);
    }

    ggml_tensor * linear(const Matrix & w, ggml_tensor * x) const {
        ggml_tensor * y = ggml_mul_mat(ctx, w.weight, x);
        return w.scale ? ggml_mul(ctx, y, w.scale) : y;
    }

    ggml_tensor * rms_norm(ggml_tensor * x, ggml_tensor * weight, float eps) const {
        return ggml_mul(ctx, ggml_rms_norm(ctx, x, eps), weight);
    }

    ggml_tensor * swiglu_ffn(ggml_tensor * x, const Matrix & gate, const Matrix & up, const Matrix & down) const {
        return linear(down, ggml_swiglu_split(ctx, linear(gate, x), linear(up, x)));
    }

    // Rotary embedding of the first n_rot dims of every head, pairs (i, i + n_rot / 2).
    ggml_tensor * rope(ggml_tensor * x /* [d, n_head, N] */, ggml_tensor * pos /* [N] */, int n_rot, float base) const {
        return ggml_rope_ext(ctx, x, pos, nullptr, n_rot, GGML_ROPE_TYPE_NEOX, 0, base, 1.0f, 0.0f, 1.0f, 32.0f, 1.0f);
    }
};

} // namespace pf
