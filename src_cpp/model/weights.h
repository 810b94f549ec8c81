// The weights of one model file: ggml tensors whose data is the mapped file itself. Asking for a tensor checks that it
// is there, with the shape and a type the runtime can multiply; what nobody asks for is never touched.
#pragma once

#include <memory>
#include <string>

#include "ggml-backend.h"
#include "gguf/file.h"
#include "graph.h"

namespace pf {

class Weights {
  public:
    explicit Weights(std::shared_ptr<const GgufFile> file);
    ~Weights();
    Weights(const Weights &) = delete;
    Weights & operator=(const Weights &) = delete;

    const GgufFile & file() const { return *file_; }

    // `name`.weight as [n_in, n_out], with `name`.scale when there is one.
    Matrix matrix(const std::string & name, int64_t n_in, int64_t n_out);
    // token_embd.weight, [n_embd, n_vocab].
    ggml_tensor * embedding(int64_t n_embd, int64_t n_vocab);
    bool has(const std::string & tensor) const { return file_->find(tensor) != nullptr; }
    // A full name; F32.
    ggml_tensor * vector(const std::string & tensor, int64_t n);
    ggml_tensor * table(const std::string & tensor, int64_t ne0, int64_t ne1);

    uint64_t n_params() const { return n_params_; }
    uint64_t n_bytes() const { return n_bytes_; }

  private:
    const GgufTensor & expect(const std::string & tensor, int64_t ne0, int64_t ne1) const;
    ggml_tensor * add(const GgufTensor & t);

    std::shared_ptr<const GgufFile> file_;
    ggml_context * ctx_ = nullptr;
    ggml_backend_buffer_t buffer_ = nullptr;
    uint64_t n_params_ = 0;
    uint64_t n_bytes_ = 0;
};

// Throws PF_ERR_FORMAT: `what` is wrong with the file.
[[noreturn]] void bad_model(const GgufFile & file, const std::string & what);

} // namespace pf
