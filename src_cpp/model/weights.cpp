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

Weights::Store::~Store() {
    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
}

Weights::Weights(std::shared_ptr<const GgufFile> file, ggml_backend_dev_t device)
    : file_(std::move(file)), device_(device) {
    mapped_.ctx = new_context();
    // ggml wants a non-const pointer; the mapping is read-only, and weights are only ever read.
    void * base = const_cast<uint8_t *>(file_->data());
    mapped_.buffer = ggml_backend_dev_buffer_from_host_ptr(cpu_device(), base, file_->size(), file_->size());
    if (!mapped_.buffer) {
        throw Error(PF_ERR_INTERNAL, file_->path() + ": the backend refused the mapped file");
    }
    ggml_backend_buffer_set_usage(mapped_.buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    if (!is_host(device_)) {
        uploaded_.ctx = new_context();
    }
}

Weights::~Weights() = default;

ggml_context * Weights::new_context() const {
    ggml_context * ctx = ggml_init({ggml_tensor_overhead() * (file_->tensors().size() + 1), nullptr, true});
    if (!ctx) {
        throw Error(PF_ERR_MEMORY, file_->path() + ": no memory for the tensor table");
    }
    return ctx;
}

uint64_t Weights::n_device_bytes() const {
    return uploaded_.buffer ? ggml_backend_buffer_get_size(uploaded_.buffer) : 0;
}

std::vector<const ggml_tensor *> Weights::tensors() const {
    ggml_context * ctx = uploaded_.ctx ? uploaded_.ctx : mapped_.ctx;
    std::vector<const ggml_tensor *> all;
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        all.push_back(t);
    }
    return all;
}

void Weights::upload() {
    if (!uploaded_.ctx || !ggml_get_first_tensor(uploaded_.ctx)) {
        return;
    }
    ggml_backend_buffer_type_t type = ggml_backend_dev_buffer_type(device_);
    size_t free = 0, total = 0;
    ggml_backend_dev_memory(device_, &free, &total);
    const size_t need = ggml_backend_alloc_ctx_tensors_from_buft_size(uploaded_.ctx, type);
    if (need <= free) {
        uploaded_.buffer = ggml_backend_alloc_ctx_tensors_from_buft(uploaded_.ctx, type);
    }
    if (!uploaded_.buffer) {
        throw Error(PF_ERR_MEMORY, file_->path() + ": its weights need " + std::to_string(need >> 20) + " MiB, but " +
                                       ggml_backend_dev_description(device_) + " has " + std::to_string(free >> 20) +
                                       " of " + std::to_string(total >> 20) +
                                       " MiB free; close what else uses it, or take a smaller quantisation");
    }
    ggml_backend_buffer_set_usage(uploaded_.buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    for (ggml_tensor * t = ggml_get_first_tensor(uploaded_.ctx); t; t = ggml_get_next_tensor(uploaded_.ctx, t)) {
        const GgufTensor & source = *file_->find(ggml_get_name(t));
        ggml_backend_tensor_set(t, file_->data() + source.offset, 0, source.size);
    }
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

const GgufTensor & Weights::expect_matrix(const std::string & tensor, int64_t n_in, int64_t n_out) const {
    const GgufTensor & t = expect(tensor, n_in, n_out);
    if (!is_weight_type(t.type)) {
        bad_model(*file_, "tensor '" + t.name + "' has type " + ggml_type_name(t.type) +
                              ", which is not a weight type; convert the model again");
    }
    return t;
}

ggml_tensor * Weights::add(const GgufTensor & t, bool to_device) {
    to_device = to_device && uploaded_.ctx;
    Store & store = to_device ? uploaded_ : mapped_;
    if (ggml_tensor * known = ggml_get_tensor(store.ctx, t.name.c_str())) {
        return known;
    }
    ggml_tensor * out = ggml_new_tensor(store.ctx, t.type, 4, t.ne);
    ggml_set_name(out, t.name.c_str());
    if (!to_device && ggml_backend_tensor_alloc(mapped_.buffer, out, const_cast<uint8_t *>(file_->data()) + t.offset) !=
                          GGML_STATUS_SUCCESS) {
        throw Error(PF_ERR_INTERNAL, file_->path() + ": tensor '" + t.name + "' could not be placed");
    }
    if (!to_device || !ggml_get_tensor(mapped_.ctx, t.name.c_str())) { // one that lies in both counts once
        n_params_ += (uint64_t) ggml_nelements(out);
        n_bytes_ += t.size;
    }
    return out;
}

Matrix Weights::matrix(const std::string & name, int64_t n_in, int64_t n_out) {
    Matrix m;
    m.weight = add(expect_matrix(name + ".weight", n_in, n_out), true);
    if (has(name + ".scale")) {
        m.scale = vector(name + ".scale", 1);
    }
    return m;
}

ggml_tensor * Weights::embedding(int64_t n_embd, int64_t n_vocab) {
    const GgufTensor & t = expect_matrix("token_embd.weight", n_embd, n_vocab);
    if (has("token_embd.scale")) {
        throw Error(PF_ERR_UNSUPPORTED,
                    file_->path() + ": tensor 'token_embd.scale': scaled embeddings are not supported");
    }
    return add(t, false);
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
    return add(t, true);
}

} // namespace pf
