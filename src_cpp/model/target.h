// A target model as a session sees it: sizes, token embeddings on the host, and one graph builder that serves prefill,
// chain and tree alike. A new architecture is one file that implements this and one line in target.cpp's registry.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cache/state.h"
#include "weights.h"

namespace pf {

// Rows of an embedding table of any weight type, dequantised on the host into [n, n_embd] f32; ids must be in range.
void embed_rows(const ggml_tensor * table, const int32_t * ids, int64_t n, float * out);

// Inputs of one pass over N nodes.
struct PassInputs {
    ggml_tensor * embd = nullptr;         // [n_embd, N] f32
    ggml_tensor * pos = nullptr;          // [N] i32, n + depth
    ggml_tensor * parent = nullptr;       // [N] i32
    ggml_tensor * kv_rows = nullptr;      // [N] i32, cache row of each node
    ggml_tensor * mask = nullptr;         // [n_kv, N] f16
    ggml_tensor * feature_rows = nullptr; // [N] i32, row of state.features for each node; only where layers are tapped
};

// What a pass says of every node: nothing, the likeliest token alone, or all of its logits.
enum class PassHead { none, choice, logits };

struct PassOptions {
    bool commit = false; // the accepted path is known beforehand: advance the state inside the graph
    PassHead head = PassHead::none;
    const std::vector<int32_t> * taps = nullptr;    // layers whose input goes to state.features
    const std::vector<int32_t> * capture = nullptr; // layers whose input is an output of the graph
};

struct PassOutputs {
    ggml_tensor * logits = nullptr; // [n_vocab, N] f32; can be read after the pass where PassHead says so
    ggml_tensor * choice =
        nullptr; // [2, N] i32: the likeliest token (-1: its logits are unusable), and its log-probability
    std::vector<ggml_tensor *> hidden; // [n_embd, N] f32 each
};

class Target {
  public:
    // On a device of find_device(). Throws before weights are loaded when they do not fit there.
    static std::shared_ptr<const Target> open(const std::string & path, ggml_backend_dev_t device);
    virtual ~Target() = default;

    int32_t n_vocab = 0;
    int32_t n_embd = 0;
    int32_t n_layer = 0;
    int32_t n_ctx_train = 0;
    StateShape state_shape;
    Matrix output; // the lm_head, [n_embd, n_vocab]

    const ggml_tensor * token_embd() const { return token_embd_; } // [n_embd, n_vocab], stays on the host
    const Weights & weights() const { return *weights_; }
    ggml_backend_dev_t device() const { return weights_->device(); }

    virtual void build_pass(const GraphBuilder & b, const PassInputs & in, const CommitInputs & commit,
                            const State & state, const PassOptions & options, PassOutputs & out) const = 0;

  protected:
    explicit Target(std::unique_ptr<Weights> weights) : weights_(std::move(weights)) {}
    // Vocabulary, embedding and output head, which all architectures share: fills n_vocab, output and the embedding.
    void load_vocabulary();

    std::unique_ptr<Weights> weights_;

  private:
    ggml_tensor * token_embd_ = nullptr;
};

} // namespace pf
