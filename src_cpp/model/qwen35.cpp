// The qwen35 architecture (Qwen3.5, 3.6, 3.8 dense): Gated DeltaNet layers with full attention every few layers.
// Text only: with equal positions on every axis its M-RoPE is NeoX rope on the temporal position. An MTP block at the
// end of the file is skipped.
#include <cmath>

#include "error.h"
#include "ggml-tree.h"
#include "target.h"

namespace pf {

namespace {

struct Attention {
    Matrix q;             // [n_embd, n_head * 2 * head_dim]: per head the query, then its gate
    Matrix k, v;          // [n_embd, n_head_kv * head_dim]
    Matrix out;           // [n_head * head_dim, n_embd]
    ggml_tensor * q_norm; // [head_dim]
    ggml_tensor * k_norm; // [head_dim]
};

struct DeltaNet {
    Matrix qkv;         // [n_embd, channels]: q heads, k heads, v heads
    Matrix z;           // [n_embd, n_value_heads * d_value]
    Matrix alpha, beta; // [n_embd, n_value_heads]
    Matrix out;         // [n_value_heads * d_value, n_embd]
    ggml_tensor * conv; // [K, channels]
    ggml_tensor * dt;   // [n_value_heads]
    ggml_tensor * a;    // [n_value_heads], -exp(A_log)
    ggml_tensor * norm; // [d_value]
};

struct Layer {
    bool recurrent;
    int index;               // among the layers of its kind
    ggml_tensor * attn_norm; // [n_embd]
    ggml_tensor * ffn_norm;  // [n_embd]
    Matrix gate, up, down;
    Attention attn;
    DeltaNet gdn;
};

class Qwen35 final : public Target {
  public:
    explicit Qwen35(std::unique_ptr<Weights> weights) : Target(std::move(weights)) {
        load_sizes();
        load_vocabulary();
        load_layers();
        weights_->upload();
    }

    void build_pass(const GraphBuilder & b, const PassInputs & in, const CommitInputs & commit, const State & state,
                    const PassOptions & options, PassOutputs & out) const override {
        ggml_tensor * h = in.embd; // [n_embd, N], the residual
        for (int il = 0; il < n_layer; ++il) {
            tap(b, il, h, in, state, options, out);
            const Layer & layer = layers_[(size_t) il];
            ggml_tensor * x = b.rms_norm(h, layer.attn_norm, eps_);
            ggml_tensor * y = layer.recurrent ? build_delta_net(b, layer, x, in, commit, state, options.commit)
                                              : build_attention(b, layer, x, in, state);
            h = ggml_add(b.ctx, h, y);
            x = b.rms_norm(h, layer.ffn_norm, eps_);
            h = ggml_add(b.ctx, h, b.swiglu_ffn(x, layer.gate, layer.up, layer.down));
        }
        tap(b, n_layer, h, in, state, options, out);
        if (options.head != PassHead::none) {
            out.logits = b.linear(output, b.rms_norm(h, output_norm_, eps_));
        }
    }

  private:
    std::vector<Layer> layers_;
    ggml_tensor * output_norm_ = nullptr; // [n_embd]
    int n_ff_ = 0, n_head_ = 0, n_rot_ = 0;
    float eps_ = 0.0f, rope_base_ = 0.0f;

    static std::string key(const char * name) { return std::string("qwen35.") + name; }

    void load_sizes() {
        const GgufFile & f = weights_->file();
        constexpr int64_t big = 1 << 24;
        n_embd = (int32_t) f.get_int(key("embedding_length"), 1, big);
        n_ctx_train = (int32_t) f.get_int(key("context_length"), 1, INT32_MAX);
        n_ff_ = (int) f.get_int(key("feed_forward_length"), 1, big);
        n_head_ = (int) f.get_int(key("attention.head_count"), 1, 65536);
        eps_ = (float) f.get_float(key("attention.layer_norm_rms_epsilon"));
        rope_base_ = (float) f.get_float(key("rope.freq_base"));
        const int64_t n_block = f.get_int(key("block_count"), 1, 4096);
        n_layer = (int32_t) (n_block - f.get_int(key("nextn_predict_layers"), 0, n_block - 1, 0));

        StateShape & s = state_shape;
        s.n_embd = n_embd;
        s.n_head_kv = (int) f.get_int(key("attention.head_count_kv"), 1, 65536);
        s.head_dim = (int) f.get_int(key("attention.key_length"), 1, 65536);
        if (f.get_int(key("attention.value_length"), 1, 65536) != s.head_dim) {
            bad_model(f, "qwen35.attention.value_length differs from key_length, which qwen35 does not know");
        }
        if (n_head_ % s.n_head_kv != 0) {
            bad_model(f, "qwen35.attention.head_count is not a multiple of head_count_kv");
        }
        n_rot_ = (int) f.get_int(key("rope.dimension_count"), 2, s.head_dim);
        if (n_rot_ % 2 != 0) {
            bad_model(f, "qwen35.rope.dimension_count is odd; rotary embedding works on pairs");
        }
        if (f.get_ints(key("rope.dimension_sections")).size() != 4) {
            bad_model(f, "qwen35.rope.dimension_sections must hold 4 numbers");
        }
        if (f.has(key("rope.scaling.type")) && f.get_string(key("rope.scaling.type")) != "none") {
            throw Error(PF_ERR_UNSUPPORTED, f.path() + ": rope scaling of type '" +
                                                f.get_string(key("rope.scaling.type")) + "' is not supported");
        }
        if (!(eps_ > 0.0f && eps_ < 1.0f) || !(rope_base_ > 0.0f) || !std::isfinite(rope_base_)) {
            bad_model(f, "qwen35.attention.layer_norm_rms_epsilon or qwen35.rope.freq_base is out of range");
        }

        s.conv_width = (int) f.get_int(key("ssm.conv_kernel"), 2, GGML_TREE_MAX_TAPS);
        s.d_key = (int) f.get_int(key("ssm.state_size"), 1, 4096);
        s.n_value_heads = (int) f.get_int(key("ssm.time_step_rank"), 1, 65536);
        s.n_key_heads = (int) f.get_int(key("ssm.group_count"), 1, 65536);
        const int64_t inner = f.get_int(key("ssm.inner_size"), 1, big);
        if (inner % s.n_value_heads != 0) {
            bad_model(f, "qwen35.ssm.inner_size is not a multiple of qwen35.ssm.time_step_rank");
        }
        s.d_value = (int) (inner / s.n_value_heads);
        if (s.d_key % 16 != 0 || s.d_value % 16 != 0) {
            throw Error(PF_ERR_UNSUPPORTED, f.path() + ": Gated DeltaNet heads of " + std::to_string(s.d_key) + " x " +
                                                std::to_string(s.d_value) + "; sizes must be multiples of 16");
        }
        s.channels = 2 * s.n_key_heads * s.d_key + s.n_value_heads * s.d_value;
    }

    std::vector<bool> recurrent_layers() const {
        const GgufFile & f = weights_->file();
        std::vector<bool> recurrent((size_t) n_layer);
        if (f.has(key("attention.recurrent_layers"))) {
            const std::vector<int64_t> given = f.get_ints(key("attention.recurrent_layers"));
            if (given.size() < recurrent.size()) {
                bad_model(f, "qwen35.attention.recurrent_layers has fewer entries than the model has layers");
            }
            for (size_t i = 0; i < recurrent.size(); ++i) {
                recurrent[i] = given[i] != 0;
            }
        } else {
            const int64_t interval = f.get_int(key("full_attention_interval"), 1, 4096, 4);
            for (size_t i = 0; i < recurrent.size(); ++i) {
                recurrent[i] = (int64_t) (i + 1) % interval != 0;
            }
        }
        return recurrent;
    }

    void load_layers() {
        Weights & w = *weights_;
        StateShape & s = state_shape;
        const int64_t head_dim = s.head_dim, n_kv = (int64_t) s.n_head_kv * head_dim,
                      n_v = (int64_t) s.n_value_heads * s.d_value;
        output_norm_ = w.vector("output_norm.weight", n_embd);
        for (const bool recurrent : recurrent_layers()) {
            const std::string p = "blk." + std::to_string(layers_.size()) + ".";
            Layer l = {};
            l.recurrent = recurrent;
            l.attn_norm = w.vector(p + "attn_norm.weight", n_embd);
            l.ffn_norm = w.vector(p + "post_attention_norm.weight", n_embd);
            l.gate = w.matrix(p + "ffn_gate", n_embd, n_ff_);
            l.up = w.matrix(p + "ffn_up", n_embd, n_ff_);
            l.down = w.matrix(p + "ffn_down", n_ff_, n_embd);
            if (recurrent) {
                l.index = s.n_recurrent++;
                l.gdn.qkv = w.matrix(p + "attn_qkv", n_embd, s.channels);
                l.gdn.z = w.matrix(p + "attn_gate", n_embd, n_v);
                l.gdn.alpha = w.matrix(p + "ssm_alpha", n_embd, s.n_value_heads);
                l.gdn.beta = w.matrix(p + "ssm_beta", n_embd, s.n_value_heads);
                l.gdn.out = w.matrix(p + "ssm_out", n_v, n_embd);
                l.gdn.conv = w.table(p + "ssm_conv1d.weight", s.conv_width, s.channels);
                l.gdn.dt = w.vector(p + "ssm_dt.bias", s.n_value_heads);
                l.gdn.a = w.vector(p + "ssm_a", s.n_value_heads);
                l.gdn.norm = w.vector(p + "ssm_norm.weight", s.d_value);
            } else {
                l.index = s.n_attn++;
                l.attn.q = w.matrix(p + "attn_q", n_embd, n_head_ * 2 * head_dim);
                l.attn.k = w.matrix(p + "attn_k", n_embd, n_kv);
                l.attn.v = w.matrix(p + "attn_v", n_embd, n_kv);
                l.attn.out = w.matrix(p + "attn_output", n_head_ * head_dim, n_embd);
                l.attn.q_norm = w.vector(p + "attn_q_norm.weight", head_dim);
                l.attn.k_norm = w.vector(p + "attn_k_norm.weight", head_dim);
            }
            layers_.push_back(l);
        }
    }

    // h is the input of layer il (n_layer: the output of the last): into the features, and out of the graph if asked for.
    void tap(const GraphBuilder & b, int il, ggml_tensor * h, const PassInputs & in, const State & state,
             const PassOptions & options, PassOutputs & out) const {
        if (options.taps) {
            for (size_t i = 0; i < options.taps->size(); ++i) {
                if ((*options.taps)[i] == il) {
                    ggml_tensor * all = state.features;
                    ggml_tensor * to = ggml_view_2d(b.ctx, all, n_embd, all->ne[1], all->nb[1],
                                                    ggml_row_size(all->type, (int64_t) i * n_embd));
                    b.keep(ggml_set_rows(b.ctx, to, h, in.feature_rows));
                }
            }
        }
        if (options.capture) {
            for (size_t i = 0; i < options.capture->size(); ++i) {
                if ((*options.capture)[i] == il) {
                    out.hidden[i] = b.output(ggml_cont(b.ctx, h));
                }
            }
        }
    }

    ggml_tensor * build_attention(const GraphBuilder & b, const Layer & layer, ggml_tensor * x, const PassInputs & in,
                                  const State & state) const {
        ggml_context * ctx = b.ctx;
        const Attention & a = layer.attn;
        const int64_t d = state_shape.head_dim, n_kv_head = state_shape.n_head_kv, n = x->ne[1];

        ggml_tensor * qg = b.linear(a.q, x); // [n_head * 2 * d, N]
        const size_t head = (size_t) d * 2 * sizeof(float);
        ggml_tensor * q = ggml_view_3d(ctx, qg, d, n_head_, n, head, qg->nb[1], 0); // [d, n_head, N]
        ggml_tensor * gate =
            ggml_view_3d(ctx, qg, d, n_head_, n, head, qg->nb[1], (size_t) d * sizeof(float)); // [d, n_head, N]
        ggml_tensor * k = ggml_reshape_3d(ctx, b.linear(a.k, x), d, n_kv_head, n);             // [d, n_head_kv, N]
        ggml_tensor * v = ggml_reshape_3d(ctx, b.linear(a.v, x), d, n_kv_head, n);             // [d, n_head_kv, N]

        q = b.rope(b.rms_norm(q, a.q_norm, eps_), in.pos, n_rot_, rope_base_);
        k = b.rope(b.rms_norm(k, a.k_norm, eps_), in.pos, n_rot_, rope_base_);
        if (state.rotate_k) {
            q = rotate(b, state.hadamard_k, q);
            k = rotate(b, state.hadamard_k, k);
        }
        if (state.rotate_v) {
            v = rotate(b, state.hadamard_v, v);
        }

        ggml_tensor * k_cache = state.k[(size_t) layer.index];
        ggml_tensor * v_cache = state.v[(size_t) layer.index];
        b.keep(ggml_set_rows(ctx, k_cache, ggml_reshape_2d(ctx, k, d * n_kv_head, n), in.kv_rows));
        b.keep(ggml_set_rows(ctx, v_cache, ggml_reshape_2d(ctx, v, d * n_kv_head, n), in.kv_rows));

        const int64_t n_kv = in.mask->ne[0];
        const auto rows = [&](ggml_tensor * cache) { // [d, n_kv, n_head_kv]
            return ggml_view_3d(ctx, cache, d, n_kv, n_kv_head, cache->nb[1], ggml_row_size(cache->type, d), 0);
        };
        ggml_tensor * o = ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), rows(k_cache), rows(v_cache),
                                              in.mask, 1.0f / std::sqrt((float) d), 0.0f, 0.0f); // [d, n_head, N]
        if (state.rotate_v) {
            o = rotate(b, state.hadamard_v, o);
        }
        o = ggml_mul(ctx, o, ggml_sigmoid(ctx, ggml_cont(ctx, gate)));
        return b.linear(a.out, ggml_reshape_2d(ctx, o, d * n_head_, n));
    }

    ggml_tensor * build_delta_net(const GraphBuilder & b, const Layer & layer, ggml_tensor * x, const PassInputs & in,
                                  const CommitInputs & commit, const State & state, bool commit_now) const {
        ggml_context * ctx = b.ctx;
        const DeltaNet & w = layer.gdn;
        const StateShape & s = state_shape;
        const int64_t n = x->ne[1], hk = s.n_key_heads, hv = s.n_value_heads;
        const size_t l = (size_t) layer.index;

        ggml_tensor * qkv = b.linear(w.qkv, x);                      // [channels, N]
        ggml_tensor * z = b.linear(w.z, x);                          // [hv * d_value, N]
        ggml_tensor * beta = ggml_sigmoid(ctx, b.linear(w.beta, x)); // [hv, N]
        ggml_tensor * g = ggml_mul(ctx, ggml_softplus(ctx, ggml_add(ctx, b.linear(w.alpha, x), w.dt)), w.a); // [hv, N]

        ggml_tensor * u = b.keep(ggml_silu(ctx, ggml_ssm_conv_tree(ctx, state.conv[l], qkv, w.conv, in.parent)));
        const size_t f = sizeof(float), key_bytes = (size_t) s.d_key * f;
        // q and k over sqrt(sum of squares + eps): rms_norm with eps / d, over sqrt(d).
        ggml_tensor * qk = ggml_view_3d(ctx, u, s.d_key, 2 * hk, n, key_bytes, u->nb[1], 0); // [d_key, 2 hk, N]
        qk = ggml_scale(ctx, ggml_rms_norm(ctx, qk, eps_ / (float) s.d_key), 1.0f / std::sqrt((float) s.d_key));
        ggml_tensor * q = ggml_view_3d(ctx, qk, s.d_key, hk, n, qk->nb[1], qk->nb[2], 0);
        ggml_tensor * k = ggml_view_3d(ctx, qk, s.d_key, hk, n, qk->nb[1], qk->nb[2], (size_t) hk * qk->nb[1]);
        ggml_tensor * v =
            ggml_view_3d(ctx, u, s.d_value, hv, n, (size_t) s.d_value * f, u->nb[1], 2 * (size_t) hk * key_bytes);

        ggml_tensor * r = ggml_gated_delta_net_tree(ctx, q, k, v, g, beta, state.s[l], in.parent);
        b.keep(r);
        ggml_tensor * delta = ggml_gated_delta_net_tree_delta(ctx, r);
        if (commit_now) {
            state.commit_recurrent(b, layer.index, qkv, k, delta, g, commit);
        } else {
            state.save_tree(b, layer.index, qkv, k, delta, g);
        }

        ggml_tensor * o = b.rms_norm(ggml_gated_delta_net_tree_out(ctx, r), w.norm, eps_); // [d_value, hv, N]
        o = ggml_swiglu_split(ctx, z, ggml_reshape_2d(ctx, o, s.d_value * hv, n));         // silu(z) * o
        return b.linear(w.out, o);
    }
};

} // namespace

std::shared_ptr<const Target> open_qwen35(std::unique_ptr<Weights> weights) {
    return std::make_shared<Qwen35>(std::move(weights));
}

} // namespace pf
