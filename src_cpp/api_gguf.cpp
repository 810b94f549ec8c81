// The C interface to GGUF files and to ggml's number formats. Refuses whatever ggml would abort on.
#include <cmath>
#include <cstring>
#include <memory>
#include <strings.h>
#include <vector>

#include "api_guard.h"
#include "gguf/impl.h"
#include "pydflash.h"

using namespace pf;

// ---- files -----------------------------------------------------------------------------------------------------

struct pf_gguf {
    std::shared_ptr<const GgufFile> file;
};

namespace {

const GgufAccess::Impl & inside(const pf_gguf * gguf) {
    return GgufAccess::impl(*gguf->file);
}

const GgufValue & need(const pf_gguf * gguf, const char * key) {
    require(gguf && key, "gguf and key must not be NULL");
    return inside(gguf).need(key);
}

const GgufValue * find(const pf_gguf * gguf, const char * key) {
    return gguf && key ? inside(gguf).find(key) : nullptr;
}

} // namespace

int pf_gguf_open(const char * path, pf_gguf ** out) {
    return guard([&] {
        require(path && out, "path and out must not be NULL");
        *out = nullptr;
        *out = new pf_gguf{GgufFile::open(path)};
    });
}

void pf_gguf_free(pf_gguf * gguf) {
    delete gguf;
}

uint64_t pf_gguf_n_keys(const pf_gguf * gguf) {
    return gguf ? inside(gguf).contents.values.size() : 0;
}

const char * pf_gguf_key(const pf_gguf * gguf, uint64_t index) {
    return index < pf_gguf_n_keys(gguf) ? inside(gguf).contents.values[index].key.c_str() : nullptr;
}

int pf_gguf_type(const pf_gguf * gguf, const char * key) {
    const GgufValue * value = find(gguf, key);
    return value ? static_cast<int>(value->is_array ? GgufType::array : value->type) : -1;
}

int pf_gguf_array_type(const pf_gguf * gguf, const char * key) {
    const GgufValue * value = find(gguf, key);
    return value && value->is_array ? static_cast<int>(value->type) : -1;
}

int pf_gguf_get_int(const pf_gguf * gguf, const char * key, int64_t * out) {
    return guard([&] {
        require(out, "out must not be NULL");
        const GgufValue & value = need(gguf, key);
        if (value.is_array) {
            inside(gguf).fail_type(value, "an integer or a bool");
        }
        *out = inside(gguf).integer(value, 0);
    });
}

int pf_gguf_get_float(const pf_gguf * gguf, const char * key, double * out) {
    return guard([&] {
        require(out, "out must not be NULL");
        *out = inside(gguf).real(need(gguf, key));
    });
}

int pf_gguf_get_string(const pf_gguf * gguf, const char * key, const char ** out, uint64_t * n_bytes) {
    return guard([&] {
        require(out && n_bytes, "out and n_bytes must not be NULL");
        const std::string_view text = inside(gguf).text(need(gguf, key));
        *out = text.data();
        *n_bytes = text.size();
    });
}

int pf_gguf_get_array(const pf_gguf * gguf, const char * key, const void ** data, uint64_t * n) {
    return guard([&] {
        require(data && n, "data and n must not be NULL");
        const GgufValue & value = need(gguf, key);
        if (!value.is_array || value.type == GgufType::string) {
            inside(gguf).fail_type(value, "an array of numbers or bools");
        }
        *data = gguf->file->data() + value.offset;
        *n = value.n;
    });
}

int pf_gguf_get_strings(const pf_gguf * gguf, const char * key, const char ** blob, const uint64_t ** offsets,
                        uint64_t * n) {
    return guard([&] {
        require(blob && offsets && n, "blob, offsets and n must not be NULL");
        const GgufValue & value = need(gguf, key);
        const JoinedStrings & joined = inside(gguf).strings(value);
        *blob = joined.text.data();
        *offsets = joined.offsets.data();
        *n = value.n;
    });
}

uint64_t pf_gguf_n_tensors(const pf_gguf * gguf) {
    return gguf ? gguf->file->tensors().size() : 0;
}

int pf_gguf_tensor(const pf_gguf * gguf, uint64_t index, pf_tensor_info * out) {
    return guard([&] {
        require(gguf && out, "gguf and out must not be NULL");
        require(index < gguf->file->tensors().size(), "there is no tensor of that index");
        const GgufTensor & tensor = gguf->file->tensors()[index];
        out->name = tensor.name.c_str();
        out->type = tensor.type;
        std::memcpy(out->ne, tensor.ne, sizeof(out->ne));
        out->offset = tensor.offset;
        out->size = tensor.size;
    });
}

// ---- number formats --------------------------------------------------------------------------------------------

namespace {

// ggml keeps the numbers of retired types, with blocks of no elements.
bool is_type(int type) {
    return type >= 0 && type < GGML_TYPE_COUNT && ggml_blck_size(static_cast<ggml_type>(type)) > 0;
}

ggml_type checked_type(int type) {
    if (!is_type(type)) {
        throw Error(PF_ERR_ARGUMENT, "ggml has no type number " + std::to_string(type));
    }
    return static_cast<ggml_type>(type);
}

// Bytes of n values, which must be whole blocks.
uint64_t checked_size(ggml_type type, int64_t n) {
    const int64_t block = ggml_blck_size(type);
    if (n % block != 0) {
        throw Error(PF_ERR_ARGUMENT, std::to_string(n) + " values are no whole number of " + ggml_type_name(type) +
                                         " blocks of " + std::to_string(block));
    }
    const int64_t n_bytes = pf_row_size(type, n);
    if (n_bytes < 0) {
        throw Error(PF_ERR_ARGUMENT, std::to_string(n) + " values take more bytes than 64 bits can count");
    }
    return static_cast<uint64_t>(n_bytes);
}

// The largest magnitude a type can be given; 0 for types that cannot be written here.
float largest(ggml_type type) {
    switch (type) {
    case GGML_TYPE_F32:
        return 3.402823466e38f;
    case GGML_TYPE_BF16:
        return 3.389531389e38f; // above, rounding would give infinity
    case GGML_TYPE_F16:
    // Block scales are f16 (or narrower), and 65504 keeps every one of them finite.
    case GGML_TYPE_Q1_0:
    case GGML_TYPE_Q2_0:
    case GGML_TYPE_Q4_0:
    case GGML_TYPE_Q4_1:
    case GGML_TYPE_Q5_0:
    case GGML_TYPE_Q5_1:
    case GGML_TYPE_Q8_0:
    case GGML_TYPE_Q2_K:
    case GGML_TYPE_Q3_K:
    case GGML_TYPE_Q4_K:
    case GGML_TYPE_Q5_K:
    case GGML_TYPE_Q6_K:
    case GGML_TYPE_IQ4_NL:
    case GGML_TYPE_IQ4_XS:
    case GGML_TYPE_TQ1_0:
    case GGML_TYPE_TQ2_0:
    case GGML_TYPE_MXFP4:
    case GGML_TYPE_NVFP4:
        return 65504.0f;
    default:
        return 0.0f;
    }
}

void refuse_unwritable(ggml_type type) {
    const std::string name = ggml_type_name(type);
    switch (type) {
    case GGML_TYPE_IQ1_S:
    case GGML_TYPE_IQ1_M:
    case GGML_TYPE_IQ2_XXS:
    case GGML_TYPE_IQ2_XS:
    case GGML_TYPE_IQ2_S:
    case GGML_TYPE_IQ3_XXS:
    case GGML_TYPE_IQ3_S:
        throw Error(PF_ERR_UNSUPPORTED, name + " wants an importance matrix, which is not taken here: choose q4_K, "
                                               "q5_K, q6_K or q8_0");
    default:
        throw Error(PF_ERR_UNSUPPORTED, "weights can't be written as " + name + ": choose f16, q8_0 or q4_K");
    }
}

void check_range(const float * src, int64_t n_per_row, int64_t n, ggml_type type) {
    const float limit = largest(type);
    for (int64_t i = 0; i < n; ++i) {
        if (!(std::fabs(src[i]) <= limit)) { // a NaN compares false
            throw Error(PF_ERR_ARGUMENT,
                        "value " + std::to_string(src[i]) + " in row " + std::to_string(i / n_per_row) + ", column " +
                            std::to_string(i % n_per_row) + " can't be written as " + ggml_type_name(type) +
                            ": it must be finite and at most " + std::to_string(limit) + " in magnitude");
        }
    }
}

} // namespace

int pf_type_from_name(const char * name) {
    for (int type = 0; name && type < GGML_TYPE_COUNT; ++type) {
        if (is_type(type) && strcasecmp(name, ggml_type_name(static_cast<ggml_type>(type))) == 0) {
            return type;
        }
    }
    return -1;
}

const char * pf_type_name(int type) {
    return is_type(type) ? ggml_type_name(static_cast<ggml_type>(type)) : nullptr;
}

int64_t pf_row_size(int type, int64_t n_per_row) {
    if (!is_type(type) || n_per_row < 0 || n_per_row % ggml_blck_size(static_cast<ggml_type>(type)) != 0) {
        return -1;
    }
    int64_t n_bytes;
    const auto n_blocks = n_per_row / ggml_blck_size(static_cast<ggml_type>(type));
    const bool overflow = __builtin_mul_overflow(n_blocks, ggml_type_size(static_cast<ggml_type>(type)), &n_bytes);
    return overflow ? -1 : n_bytes;
}

int pf_quantize(int type_number, const float * src, int64_t n_per_row, int64_t n_rows, void * dst, uint64_t dst_size) {
    return guard([&] {
        require(src && dst, "src and dst must not be NULL");
        require(n_per_row > 0 && n_rows > 0, "n_per_row and n_rows must be at least 1");
        const ggml_type type = checked_type(type_number);
        if (largest(type) == 0.0f) {
            refuse_unwritable(type);
        }
        const uint64_t row_size = checked_size(type, n_per_row);
        int64_t n;
        uint64_t n_bytes;
        if (__builtin_mul_overflow(n_per_row, n_rows, &n) || __builtin_mul_overflow(row_size, n_rows, &n_bytes)) {
            throw Error(PF_ERR_ARGUMENT, "n_per_row times n_rows is more than 64 bits can count");
        }
        if (dst_size != n_bytes) {
            throw Error(PF_ERR_ARGUMENT,
                        "dst_size is " + std::to_string(dst_size) + " and must be " + std::to_string(n_bytes));
        }
        check_range(src, n_per_row, n, type);

        if (!ggml_is_quantized(type)) {
            ggml_quantize_chunk(type, src, dst, 0, n_rows, n_per_row, nullptr);
            return;
        }
        // ggml's quantisers divide by a block's largest value, which for next to nothing gives infinity (and in mxfp4 an
        // exponent that wraps to a huge one). What is this small is zero in every format with blocks.
        constexpr float nothing = 1e-30f;
        std::vector<float> row(n_per_row);
        for (int64_t i = 0; i < n_rows; ++i) {
            for (int64_t j = 0; j < n_per_row; ++j) {
                const float x = src[i * n_per_row + j];
                row[j] = std::fabs(x) < nothing ? 0.0f : x;
            }
            ggml_quantize_chunk(type, row.data(), static_cast<char *>(dst) + i * row_size, 0, 1, n_per_row, nullptr);
        }
    });
}

int pf_dequantize(int type_number, const void * src, uint64_t src_size, int64_t n_values, float * dst) {
    return guard([&] {
        require(src && dst, "src and dst must not be NULL");
        require(n_values > 0, "n_values must be at least 1");
        const ggml_type type = checked_type(type_number);
        const uint64_t n_bytes = checked_size(type, n_values);
        if (src_size != n_bytes) {
            throw Error(PF_ERR_ARGUMENT,
                        "src_size is " + std::to_string(src_size) + " and must be " + std::to_string(n_bytes));
        }
        if (type == GGML_TYPE_F32) {
            std::memcpy(dst, src, src_size);
            return;
        }
        const ggml_to_float_t to_float = ggml_get_type_traits(type)->to_float;
        if (!to_float) {
            throw Error(PF_ERR_UNSUPPORTED, std::string(ggml_type_name(type)) + " is not a format of weights, so it "
                                                                                "has no conversion to f32");
        }
        to_float(src, dst, n_values);
    });
}
