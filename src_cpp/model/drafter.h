// The DFlash drafter: a few transformer layers that propose a whole block in one pass from the target's own hidden
// states. It has no embedding and no head of its own unless the file brings them; the target's are used.
//
// Its memory is the context K/V ring: keys and values of each committed position, computed once, kept at absolute
// positions in slot `block_size + p % n_ring`. The first block_size slots belong to the block being drafted. Beside it
// lies the embedding of MASK, which all slots of a block but the first begin with.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "target.h"
#include "weights.h"

namespace pf {

class Drafter;

// The drafter's context K/V ring of one session.
class DraftCache {
  public:
    DraftCache(const Drafter & drafter, int64_t n_ring, ggml_type type, const Memory & memory);
    DraftCache(const DraftCache &) = delete;
    DraftCache & operator=(const DraftCache &) = delete;

    int32_t block_size;
    int64_t n_ring;
    int64_t n_slots;                 // block, ring and one slot for pads; a multiple of 256
    std::vector<ggml_tensor *> k, v; // [n_head_kv * head_dim, n_slots] a layer
    ggml_tensor * mask_embd;         // [n_embd] f32

    int64_t slot(int64_t pos) const { return block_size + pos % n_ring; }
    int64_t pad_slot() const { return block_size + n_ring; }
    uint64_t n_bytes() const { return block_.n_bytes(); }

  private:
    TensorBlock block_;
};

struct AppendInputs {
    ggml_tensor * nodes = nullptr; // [R] i32, rows of the last pass's features
    ggml_tensor * pos = nullptr;   // [R] i32
    ggml_tensor * slots = nullptr; // [R] i32
};

struct DraftInputs {
    ggml_tensor * embd = nullptr;        // [n_embd] f32, of the pending token
    ggml_tensor * pos = nullptr;         // [block_size] i32
    ggml_tensor * n_committed = nullptr; // [1] i32
};

class Drafter {
  public:
    // On the target's device. Throws PF_ERR_MISMATCH when it does not belong to the target.
    static std::shared_ptr<const Drafter> open(const std::string & path, std::shared_ptr<const Target> target);

    int32_t n_layer = 0;
    int32_t block_size = 0;
    int32_t mask_token_id = 0;
    int n_head_kv = 0, head_dim = 0;
    std::vector<int32_t> taps; // tap k is the input of target layer k

    const Weights & weights() const { return *weights_; }
    const Target & target() const { return *target_; }
    const ggml_tensor * own_token_embd() const { return token_embd_; } // null: the target's is used
    // [n_embd] f32, as the drafter embeds it.
    void embed(int32_t token, float * out) const;

    // Features of R committed positions become keys and values in the ring.
    void build_append(const GraphBuilder & b, const AppendInputs & in, ggml_tensor * features,
                      const DraftCache & cache) const;
    // One pass over the block; logits of slots 1 .. n_depth, [n_vocab, n_depth].
    ggml_tensor * build_draft(const GraphBuilder & b, const DraftInputs & in, int64_t n_kv, int32_t n_depth,
                              const DraftCache & cache) const;

  private:
    struct Layer {
        ggml_tensor *attn_norm, *q_norm, *k_norm, *ffn_norm;
        Matrix q, k, v, out, gate, up, down;
        bool sliding;
    };

    Drafter(std::unique_ptr<Weights> weights, std::shared_ptr<const Target> target);
    void load_sizes();
    void load_layers();
    ggml_tensor * build_mask(const GraphBuilder & b, const DraftInputs & in, int64_t n_kv, int64_t n_ring,
                             bool sliding) const;

    std::unique_ptr<Weights> weights_;
    std::shared_ptr<const Target> target_;
    std::vector<Layer> layers_;
    Matrix fc_;                                // [n_taps * n_embd, n_embd]
    Matrix head_;                              // the file's own lm_head, else the target's
    ggml_tensor * hidden_norm_ = nullptr;      // [n_embd]
    ggml_tensor * output_norm_ = nullptr;      // [n_embd]
    const ggml_tensor * token_embd_ = nullptr; // the file's own, read on the host; null: the target's
    int n_head_ = 0, n_ff_ = 0;
    float eps_ = 0.0f, rope_base_ = 0.0f;
    float embedding_scale_ = 1.0f, attention_scale_ = 0.0f, logit_scale_ = 1.0f, softcap_ = 0.0f;
    int64_t window_ = 0;
    int causal_ = -1; // -1: by layer kind, as the reference does
};

} // namespace pf
