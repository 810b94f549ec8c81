#include "drafter.h"

#include <algorithm>
#include <cmath>

#include "error.h"
#include "ggml-tree.h"

namespace pf {

DraftCache::DraftCache(const Drafter & drafter, int64_t ring, ggml_type type, const Memory & memory)
    : block_size(drafter.block_size), n_ring(ring), n_slots(round_up(block_size + ring + 1, kv_granule)),
      block_((size_t) drafter.n_layer * 2 + 1) {
    const int64_t n_kv_row = (int64_t) drafter.n_head_kv * drafter.head_dim;
    for (int i = 0; i < drafter.n_layer; ++i) {
        k.push_back(block_.add(type, n_kv_row, n_slots));
        v.push_back(block_.add(type, n_kv_row, n_slots));
    }
    mask_embd = block_.add(GGML_TYPE_F32, drafter.target().n_embd, 1);
    block_.allocate(memory, "the drafter's context cache");
    if (!memory.planned) {
        std::vector<float> row((size_t) drafter.target().n_embd);
        drafter.embed(drafter.mask_token_id, row.data());
        ggml_backend_tensor_set(mask_embd, row.data(), 0, row.size() * sizeof(float));
    }
}

std::shared_ptr<const Drafter> Drafter::open(const std::string & path, std::shared_ptr<const Target> target) {
    std::shared_ptr<const GgufFile> file = GgufFile::open(path);
    const std::string name = file->get_string("general.architecture");
    if (name != "dflash") {
        throw Error(PF_ERR_UNSUPPORTED,
                    path + ": architecture '" + name + "' is not a drafter this runtime runs (dflash)");
    }
    return std::shared_ptr<const Drafter>(new Drafter(std::make_unique<Weights>(file, target->device()), target));
}

Drafter::Drafter(std::unique_ptr<Weights> weights, std::shared_ptr<const Target> target)
    : weights_(std::move(weights)), target_(std::move(target)) {
    load_sizes();
    load_layers();
    weights_->upload();
}

void Drafter::load_sizes() {
    const GgufFile & f = weights_->file();
    const auto key = [](const char * name) { return std::string("dflash.") + name; };
    const auto mismatch = [&](const std::string & what) { throw Error(PF_ERR_MISMATCH, f.path() + ": " + what); };

    for (const char * k :
         {"conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k", "hyper_connection.count"}) {
        if (f.has(key(k))) {
            throw Error(PF_ERR_UNSUPPORTED,
                        f.path() + ": key 'dflash." + k +
                            "' marks a DFlash2 or DeepSeek drafter, which this runtime does not run yet");
        }
    }
    for (const char * t :
         {"markov_w1.weight", "conf_proj.weight", "selector_hidden.weight", "d2t", "blk.0.attn_sinks.weight",
          "blk.0.attn_post_norm.weight", "blk.0.post_attention_norm.weight", "rope_freqs.weight"}) {
        if (f.find(t)) {
            throw Error(PF_ERR_UNSUPPORTED,
                        f.path() + ": tensor '" + t +
                            "' marks a drafter of another kind (DSpark, DFlash2, reduced vocabulary), "
                            "which this runtime does not run yet");
        }
    }

    if (f.has(key("rope.scaling.type")) && f.get_string(key("rope.scaling.type")) != "none") {
        throw Error(PF_ERR_UNSUPPORTED, f.path() + ": rope scaling of type '" + f.get_string(key("rope.scaling.type")) +
                                            "' is not supported");
    }

    const int64_t n_embd = f.get_int(key("embedding_length"), 1, 1 << 24);
    if (n_embd != target_->n_embd) {
        mismatch("the drafter is " + std::to_string(n_embd) + " wide and the target " +
                 std::to_string(target_->n_embd) + "; it was trained for another target");
    }
    n_layer = (int32_t) f.get_int(key("block_count"), 1, 256);
    n_ff_ = (int) f.get_int(key("feed_forward_length"), 1, 1 << 24);
    n_head_ = (int) f.get_int(key("attention.head_count"), 1, 65536);
    n_head_kv = (int) f.get_int(key("attention.head_count_kv"), 1, 65536, n_head_);
    head_dim = (int) f.get_int(key("attention.key_length"), 2, 65536);
    if (f.get_int(key("attention.value_length"), 1, 65536, head_dim) != head_dim || n_head_ % n_head_kv != 0 ||
        head_dim % 2 != 0) {
        bad_model(f, "the dflash.attention head counts and lengths do not fit together");
    }
    if (f.get_int(key("rope.dimension_count"), 1, 65536, head_dim) != head_dim) {
        throw Error(PF_ERR_UNSUPPORTED, f.path() +
                                            ": dflash.rope.dimension_count is not the whole head; partial rotary "
                                            "embedding is not what DFlash drafters do");
    }
    eps_ = (float) f.get_float(key("attention.layer_norm_rms_epsilon"));
    rope_base_ = (float) f.get_float(key("rope.freq_base"));
    if (!(eps_ > 0.0f && eps_ < 1.0f) || !(rope_base_ > 0.0f) || !std::isfinite(rope_base_)) {
        bad_model(f, "dflash.attention.layer_norm_rms_epsilon or dflash.rope.freq_base is out of range");
    }
    block_size = (int32_t) f.get_int(key("block_size"), 2, PF_MAX_NODES);
    mask_token_id = (int32_t) f.get_int("tokenizer.ggml.mask_token_id", 0, INT32_MAX);

    embedding_scale_ = (float) f.get_float(key("embedding_scale"), 1.0);
    attention_scale_ = (float) f.get_float(key("attention.scale"), 1.0 / std::sqrt((double) head_dim));
    logit_scale_ = (float) f.get_float(key("logit_scale"), 1.0);
    softcap_ = (float) f.get_float(key("final_logit_softcapping"), 0.0);
    if (f.has(key("hidden_activation")) && f.get_string(key("hidden_activation")) != "silu") {
        throw Error(PF_ERR_UNSUPPORTED, f.path() + ": dflash.hidden_activation '" +
                                            f.get_string(key("hidden_activation")) + "' is not supported, only silu");
    }
    if (f.has(key("attention.causal"))) {
        causal_ = f.get_bool(key("attention.causal"), false) ? 1 : 0;
    }
    window_ = f.get_int(key("attention.sliding_window"), 0, INT32_MAX, 0);

    const std::vector<int64_t> layers = f.get_ints(key("target_layers"));
    if (layers.empty() || layers.size() > 32) {
        bad_model(f, "dflash.target_layers must name 1 to 32 layers");
    }
    for (const int64_t l : layers) {
        if (l < 0 || l > target_->n_layer) {
            mismatch("dflash.target_layers names layer " + std::to_string(l) + ", but the target has " +
                     std::to_string(target_->n_layer) + "; the drafter was trained for another target");
        }
        taps.push_back((int32_t) l);
    }
    if (mask_token_id >= target_->n_vocab) {
        mismatch("the drafter's mask token is " + std::to_string(mask_token_id) + ", but the target's vocabulary has " +
                 std::to_string(target_->n_vocab) + " tokens");
    }
    const uint64_t n_tokens = f.array_size("tokenizer.ggml.tokens");
    if (n_tokens != 0 && n_tokens != (uint64_t) target_->n_vocab) {
        mismatch("the drafter's vocabulary has " + std::to_string(n_tokens) + " tokens and the target's " +
                 std::to_string(target_->n_vocab));
    }
}

void Drafter::load_layers() {
    Weights & w = *weights_;
    const GgufFile & f = w.file();
    const int64_t n_embd = target_->n_embd, n_q = (int64_t) n_head_ * head_dim, n_kv = (int64_t) n_head_kv * head_dim;

    std::vector<int64_t> pattern((size_t) n_layer, 0);
    if (window_ > 0) {
        pattern = f.get_ints("dflash.attention.sliding_window_pattern");
        if (pattern.size() != (size_t) n_layer) {
            bad_model(f, "dflash.attention.sliding_window_pattern must have one entry per layer");
        }
    }
    fc_ = w.matrix("fc", (int64_t) taps.size() * n_embd, n_embd);
    hidden_norm_ = w.vector("enc.output_norm.weight", n_embd);
    output_norm_ = w.vector("output_norm.weight", n_embd);
    if (w.has("token_embd.weight")) {
        token_embd_ = w.embedding(n_embd, target_->n_vocab);
    }
    head_ = w.has("output.weight") ? w.matrix("output", n_embd, target_->n_vocab) : target_->output;
    for (int32_t i = 0; i < n_layer; ++i) {
        const std::string p = "blk." + std::to_string(i) + ".";
        Layer l;
        l.sliding = pattern[(size_t) i] != 0;
        l.attn_norm = w.vector(p + "attn_norm.weight", n_embd);
        l.q_norm = w.vector(p + "attn_q_norm.weight", head_dim);
        l.k_norm = w.vector(p + "attn_k_norm.weight", head_dim);
        l.ffn_norm = w.vector(p + "ffn_norm.weight", n_embd);
        l.q = w.matrix(p + "attn_q", n_embd, n_q);
        l.k = w.matrix(p + "attn_k", n_embd, n_kv);
        l.v = w.matrix(p + "attn_v", n_embd, n_kv);
        l.out = w.matrix(p + "attn_output", n_q, n_embd);
        l.gate = w.matrix(p + "ffn_gate", n_embd, n_ff_);
        l.up = w.matrix(p + "ffn_up", n_embd, n_ff_);
        l.down = w.matrix(p + "ffn_down", n_ff_, n_embd);
        layers_.push_back(l);
    }
}

void Drafter::embed(int32_t token, float * out) const {
    embed_rows(token_embd_ ? token_embd_ : target_->token_embd(), &token, 1, out);
}

void Drafter::build_append(const GraphBuilder & b, const AppendInputs & in, ggml_tensor * features,
                           const DraftCache & cache) const {
    ggml_context * ctx = b.ctx;
    const int64_t n = in.pos->ne[0];
    ggml_tensor * feat = ggml_get_rows(ctx, features, in.nodes);           // [n_taps * n_embd, R]
    ggml_tensor * c = b.rms_norm(b.linear(fc_, feat), hidden_norm_, eps_); // [n_embd, R]
    for (size_t i = 0; i < layers_.size(); ++i) {
        const Layer & l = layers_[i];
        ggml_tensor * k = ggml_reshape_3d(ctx, b.linear(l.k, c), head_dim, n_head_kv, n);
        k = b.rope(b.rms_norm(k, l.k_norm, eps_), in.pos, head_dim, rope_base_);
        const int64_t row = (int64_t) head_dim * n_head_kv;
        b.keep(ggml_set_rows(ctx, cache.k[i], ggml_reshape_2d(ctx, k, row, n), in.slots));
        b.keep(ggml_set_rows(ctx, cache.v[i], b.linear(l.v, c), in.slots));
    }
}

ggml_tensor * Drafter::build_mask(const GraphBuilder & b, const DraftInputs & in, int64_t n_kv, int64_t n_ring,
                                  bool sliding) const {
    const bool causal = causal_ >= 0 ? causal_ == 1 : sliding;
    return ggml_block_mask(b.ctx, in.n_committed, n_kv, block_size, n_ring, sliding ? window_ : 0, causal);
}

ggml_tensor * Drafter::build_draft(const GraphBuilder & b, const DraftInputs & in, int64_t n_kv, int32_t n_depth,
                                   const DraftCache & cache) const {
    ggml_context * ctx = b.ctx;
    const int64_t n = block_size, d = head_dim, row = d * n_head_kv;
    ggml_tensor * mask[2] = {}; // of full and of sliding layers, [n_kv, block_size] f16
    ggml_tensor * h = ggml_concat(ctx, in.embd, ggml_repeat_4d(ctx, cache.mask_embd, in.embd->ne[0], n - 1, 1, 1), 1);
    if (embedding_scale_ != 1.0f) {
        h = ggml_scale(ctx, h, embedding_scale_);
    }
    for (size_t i = 0; i < layers_.size(); ++i) {
        const Layer & l = layers_[i];
        ggml_tensor * x = b.rms_norm(h, l.attn_norm, eps_);
        ggml_tensor * q = ggml_reshape_3d(ctx, b.linear(l.q, x), d, n_head_, n);
        ggml_tensor * k = ggml_reshape_3d(ctx, b.linear(l.k, x), d, n_head_kv, n);
        q = b.rope(b.rms_norm(q, l.q_norm, eps_), in.pos, (int) d, rope_base_);
        k = b.rope(b.rms_norm(k, l.k_norm, eps_), in.pos, (int) d, rope_base_);
        const auto block = [&](ggml_tensor * t) { return ggml_view_2d(ctx, t, row, n, t->nb[1], 0); };
        b.keep(ggml_cpy(ctx, ggml_reshape_2d(ctx, k, row, n), block(cache.k[i])));
        b.keep(ggml_cpy(ctx, b.linear(l.v, x), block(cache.v[i])));

        const auto slots = [&](ggml_tensor * t) { // [d, n_kv, n_head_kv]
            return ggml_view_3d(ctx, t, d, n_kv, n_head_kv, t->nb[1], ggml_row_size(t->type, d), 0);
        };
        ggml_tensor *& m = mask[l.sliding];
        m = m ? m : build_mask(b, in, n_kv, cache.n_ring, l.sliding);
        ggml_tensor * o = ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), slots(cache.k[i]),
                                              slots(cache.v[i]), m, attention_scale_, 0.0f, 0.0f);
        h = ggml_add(ctx, h, b.linear(l.out, ggml_reshape_2d(ctx, o, d * n_head_, n)));
        h = ggml_add(ctx, h, b.swiglu_ffn(b.rms_norm(h, l.ffn_norm, eps_), l.gate, l.up, l.down));
    }
    h = ggml_view_2d(ctx, h, h->ne[0], n_depth, h->nb[1], h->nb[1]); // slot 0 is the pending token itself
    ggml_tensor * logits = b.linear(head_, b.rms_norm(h, output_norm_, eps_));
    if (logit_scale_ != 1.0f) {
        logits = ggml_scale(ctx, logits, logit_scale_);
    }
    if (softcap_ > 0.0f) {
        logits = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, logits, 1.0f / softcap_)), softcap_);
    }
    return logits;
}

} // namespace pf
