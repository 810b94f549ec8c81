// The weights of one model file: ggml tensors whose data is the mapped file itself, or for a device with memory of its
// own, copied there. Asking for a tensor checks that it is there, with the shape and a type the runtime can multiply;
// what nobody asks for is never touched.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "gguf/file.h"
#include "graph.h"

namespace pf {

class Weights {
  public:
    Weights(std::shared_ptr<const GgufFile> file, ggml_backend_dev_t device);
    ~Weights();
    Weights(const Weights &) = delete;
    Weights & operator=(const Weights &) = delete;

    const GgufFile & file() const { return *file_; }
    ggml_backend_dev_t device() const { return device_; }

    // `name`.weight as [n_in, n_out], with `name`.scale when there is one.
    Matrix matrix(const std::string & name, int64_t n_in, int64_t n_out);
    // token_embd.weight, [n_embd, n_vocab]; in the mapped file whatever the device, since its rows are looked up there.
    ggml_tensor * embedding(int64_t n_embd, int64_t n_vocab);
    bool has(const std::string & tensor) const { return file_->find(tensor) != nullptr; }
    // A full name; F32.
    ggml_tensor * vector(const std::string & tensor, int64_t n);
    ggml_tensor * table(const std::string & tensor, int64_t ne0, int64_t ne1);

    // Copies what has been asked for to the device; nothing may be asked for afterwards. On the CPU there is nothing to do.
    // Throws PF_ERR_MEMORY before anything is copied when it does not fit.
    void upload();

    // What the device holds of the file, uploaded or yet to be; on the CPU everything that has been asked for.
    std::vector<const ggml_tensor *> tensors() const;

    uint64_t n_params() const { return n_params_; }
    uint64_t n_bytes() const { return n_bytes_; }
    uint64_t n_device_bytes() const; // of the device's own memory; 0 on the CPU

  private:
    // Tensors and the memory they lie in.
    struct Store {
        ggml_context * ctx = nullptr;
        ggml_backend_buffer_t buffer = nullptr;
        ~Store();
    };

    const GgufTensor & expect(const std::string & tensor, int64_t ne0, int64_t ne1) const;
    const GgufTensor & expect_matrix(const std::string & tensor, int64_t n_in, int64_t n_out) const;
    ggml_tensor * add(const GgufTensor & t, bool to_device);
    ggml_context * new_context() const;

    std::shared_ptr<const GgufFile> file_;
    ggml_backend_dev_t device_;
    Store mapped_;   // the file
    Store uploaded_; // on the device; unused on the CPU
    uint64_t n_params_ = 0;
    uint64_t n_bytes_ = 0;
};

// Throws PF_ERR_FORMAT: `what` is wrong with the file.
[[noreturn]] void bad_model(const GgufFile & file, const std::string & what);

} // namespace pf
