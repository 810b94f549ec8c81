#include "target.h"

#include <cstring>

#include "error.h"

namespace pf {

std::shared_ptr<const Target> open_qwen35(std::unique_ptr<Weights> weights);

namespace {

struct Architecture {
    const char * name; // general.architecture
    std::shared_ptr<const Target> (*open)(std::unique_ptr<Weights> weights);
};

const Architecture registry[] = {
    {"qwen35", open_qwen35},
};

} // namespace

std::shared_ptr<const Target> Target::open(const std::string & path, ggml_backend_dev_t device) {
    std::shared_ptr<const GgufFile> file = GgufFile::open(path);
    const std::string name = file->get_string("general.architecture");
    std::string known;
    for (const Architecture & a : registry) {
        if (name == a.name) {
            return a.open(std::make_unique<Weights>(file, device));
        }
        known += std::string(known.empty() ? "" : ", ") + a.name;
    }
    throw Error(PF_ERR_UNSUPPORTED, path + ": architecture '" + name + "' is not one this runtime runs as a target (" +
                                        known + ")" +
                                        (name == "dflash" ? "; this file is a drafter, pass it as draft" : ""));
}

void Target::load_vocabulary() {
    const GgufFile & file = weights_->file();
    const GgufTensor * embd = file.find("token_embd.weight");
    if (!embd) {
        bad_model(file, "tensor 'token_embd.weight' is missing; the file is incomplete");
    }
    if (embd->ne[1] > INT32_MAX) {
        bad_model(file,
                  "tensor 'token_embd.weight' has " + std::to_string(embd->ne[1]) + " rows, too many for a vocabulary");
    }
    n_vocab = (int32_t) embd->ne[1];
    const uint64_t n_tokens = file.array_size("tokenizer.ggml.tokens");
    if (n_tokens != 0 && n_tokens != (uint64_t) n_vocab) {
        bad_model(file, "key 'tokenizer.ggml.tokens' lists " + std::to_string(n_tokens) +
                            " tokens, but tensor 'token_embd.weight' has " + std::to_string(n_vocab) +
                            " rows; vocabulary and weights do not belong together");
    }
    token_embd_ = weights_->embedding(n_embd, n_vocab);
    output = weights_->matrix(weights_->has("output.weight") ? "output" : "token_embd", n_embd, n_vocab);
}

void embed_rows(const ggml_tensor * table, const int32_t * ids, int64_t n, float * out) {
    const int64_t n_embd = table->ne[0];
    const auto * traits = ggml_get_type_traits(table->type);
    for (int64_t i = 0; i < n; ++i) {
        const char * row = (const char *) table->data + (size_t) ids[i] * table->nb[1];
        if (table->type == GGML_TYPE_F32) {
            std::memcpy(out + i * n_embd, row, (size_t) n_embd * sizeof(float));
        } else {
            traits->to_float(row, out + i * n_embd, n_embd);
        }
    }
}

} // namespace pf
