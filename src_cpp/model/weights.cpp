#include "weights.h"

#include "backend.h"
#include "error.h"

namespace pf {

namespace {

std::string shape_text(const int64_t * ne) {
    return "[" + std::to_string(ne[0]) + ", " + std::to_string(ne[1]) +
           (ne[2] * ne[3] != 1 ? ", " + std::to_string(ne[2]) + ", " + std::to_string(ne[3]) : "") + "]";
}

// Types that can be multiplied with: those ggml can turn into floats, less the ones it only uses in between.
bool is_weight_type(ggml_type type) {
    return type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float != nullptr;
}

} // namespace

void bad_model(const GgufFile & file, const std::string & what) {
    throw Error(PF_ERR_FORMAT, file.path() + ": " + what);
}

Weights::Weights(std::shared_ptr<const GgufFile> file) : file_(std::move(file)) {
    const ggml_backend_dev_t device = cpu_device();
    const ggml_init_params params = {ggml_tensor_overhead() * (file_->tensors().size() + 1), nullptr, true};
    ctx_ = ggml_init(params);
    if (!ctx_) {
        throw Error(PF_ERR_MEMORY, file_->path() + ": no memory for the tensor table");
    }
    // ggml wants a non-const pointer; the mapping is read-only, and weights are only ever read.
    void * base = const_cast<uint8_t *>(file_->data());
    buffer_ = ggml_backend_dev_buffer_from_host_ptr(device, base, file_->size(), file_->size());
    if (!buffer_) {
        ggml_free(ctx_);
        throw Error(PF_ERR_INTERNAL, file_->path() + ": the backend refused the mapped file");
    }
    ggml_backend_buffer_set_usage(buffer_, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
}

Weights::~Weights() {
    ggml_backend_buffer_free(buffer_);
    ggml_free(ctx_);
}

const GgufTensor & Weights::expect(const std::string & tensor, int64_t ne0, int64_t ne1) const {
    const GgufTensor * t = file_->find(tensor);
    if (!t) {
        bad_model(*file_, "tensor '" + tensor + "' is missing; the file is incomplete or of another architecture");
    }
    const int64_t want[4] = {ne0, ne1, 1, 1};
    for (int i = 0; i < 4; ++i) {
        if (t->ne[i] != want[i]) {
            bad_model(*file_, "tensor '" + tensor + "' at offset " + std::to_string(t->offset) + " has shape " +
                                  shape_text(t->ne) + "; the metadata asks for " + shape_text(want));
        }
    }
    return *t;
}

ggml_tensor * Weights::add(const GgufTensor & t) {
    ggml_tensor * out = ggml_new_tensor(ctx_, t.type, 4, t.ne);
    ggml_set_name(out, t.name.c_str());
    if (ggml_backend_tensor_alloc(buffer_, out, const_cast<uint8_t *>(file_->data()) + t.offset) !=
        GGML_STATUS_SUCCESS) {
        throw Error(PF_ERR_INTERNAL, file_->path() + ": tensor '" + t.name + "' could not be placed");
    }
    n_params_ += (uint64_t) ggml_nelements(out);
    n_bytes_ += t.size;
    return out;
}

Matrix Weights::matrix(const std::string & name, int64_t n_in, int64_t n_out) {
    const GgufTensor & t = expect(name + ".weight", n_in, n_out);
    if (!is_weight_type(t.type)) {
        bad_model(*file_, "tensor '" + t.name + "' has type " + ggml_type_name(t.type) +
                              ", which is not a weight type; convert the model again");
    }
    Matrix m;
    m.weight = add(t);
    if (has(name + ".scale")) {
        m.scale = vector(name + ".scale", 1);
    }
    return m;
}

ggml_tensor * Weights::embedding(int64_t n_embd, int64_t n_vocab) {
    const Matrix m = matrix("token_embd", n_embd, n_vocab);
    if (m.scale) {
        throw Error(PF_ERR_UNSUPPORTED,
                    file_->path() + ": tensor 'token_embd.scale': scaled embeddings are not supported");
    }
    return m.weight;
}

ggml_tensor * Weights::vector(const std::string & tensor, int64_t n) {
    return table(tensor, n, 1);
}

ggml_tensor * Weights::table(const std::string & tensor, int64_t ne0, int64_t ne1) {
    const GgufTensor & t = expect(tensor, ne0, ne1);
    if (t.type != GGML_TYPE_F32) {
        bad_model(*file_, "tensor '" + tensor + "' has type " + ggml_type_name(t.type) +
                              "; norms, biases and convolution kernels must be F32");
    }
    return add(t);
}

} // namespace pf
