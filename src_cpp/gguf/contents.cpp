#include "gguf/contents.h"

#include <algorithm>

#include "gguf/cursor.h"

namespace pf {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "GGUF values are used as they lie in the file");

namespace {

constexpr uint64_t max_key_length = 65535;         // GGUF's own limit
constexpr uint64_t min_value_size = 8 + 1 + 4 + 1; // name length, name, type, a byte
constexpr uint64_t min_tensor_size = 8 + 1 + 4 + 8 + 4 + 8;
constexpr uint64_t default_alignment = 32;

struct TypeFacts {
    const char * name;
    uint64_t size;
};
constexpr TypeFacts type_facts[] = {
    {"u8", 1},   {"i8", 1},     {"u16", 2},   {"i16", 2}, {"u32", 4}, {"i32", 4}, {"f32", 4},
    {"bool", 1}, {"string", 0}, {"array", 0}, {"u64", 8}, {"i64", 8}, {"f64", 8},
};
constexpr uint32_t n_types = sizeof(type_facts) / sizeof(type_facts[0]);

class Parser {
  public:
    Parser(const std::string & path, const uint8_t * data, uint64_t size) : in_(path, data, size), data_(data) {}

    GgufContents parse() {
        read_header();
        for (uint64_t i = 0; i < n_values_; ++i) {
            read_value(i);
        }
        read_alignment();
        in_.set_field("the list of tensors"); // counted again, now that the keys have taken their part
        in_.check_count(n_tensors_, min_tensor_size, "tensors", in_.position());
        for (uint64_t i = 0; i < n_tensors_; ++i) {
            read_tensor(i);
        }
        place_tensors();
        return std::move(out_);
    }

  private:
    void read_header() {
        const std::string_view magic(reinterpret_cast<const char *>(in_.take(4, "the magic")), 4);
        if (magic == "vers") { // "version https://git-lfs.github.com/spec/v1"
            in_.fail(0, "this is a Git LFS pointer, not the model it stands for: run `git lfs pull`");
        }
        if (magic != "GGUF") {
            in_.fail(0, "a GGUF file begins with 'GGUF', this one with " + quoted(magic) + ": give the model's GGUF");
        }
        const auto version = in_.read<uint32_t>("the version");
        if (version != 0 && (version & 0xffff) == 0) {
            in_.fail(4, "the file was written for big-endian machines: get the little-endian one", PF_ERR_UNSUPPORTED);
        }
        if (version == 1) {
            in_.fail(4, "GGUF version 1 is too old: get a newer conversion of the model", PF_ERR_UNSUPPORTED);
        }
        if (version != 2 && version != 3) {
            in_.fail(4, "GGUF version " + std::to_string(version) + " is not known here (versions 2 and 3 are)",
                     PF_ERR_UNSUPPORTED);
        }
        n_tensors_ = in_.read<uint64_t>("the number of tensors");
        n_values_ = in_.read<uint64_t>("the number of keys");
        in_.check_count(n_tensors_, min_tensor_size, "tensors", 8);
        in_.check_count(n_values_, min_value_size, "keys", 16);
    }

    void read_value(uint64_t number) {
        const uint64_t start = in_.position();
        in_.set_field("key number " + std::to_string(number));
        const std::string_view key = in_.read_text("its name");
        if (key.empty() || key.size() > max_key_length) {
            in_.fail(start, "its name is " + std::to_string(key.size()) + " bytes long (1 to 65535 are allowed)");
        }
        if (!is_printable(key)) {
            in_.fail(start, "its name " + quoted(key) + " is not plain ASCII");
        }
        in_.set_field("key " + quoted(key));
        if (!out_.value_index.emplace(key, out_.values.size()).second) {
            in_.fail(start, "the key is there twice");
        }

        GgufValue value{std::string(key), read_type(), false, 1, 0, 0};
        if (value.type == GgufType::array) {
            value.is_array = true;
            value.type = read_type();
            if (value.type == GgufType::array) {
                in_.fail(start, "holds arrays within an array, which nothing here reads", PF_ERR_UNSUPPORTED);
            }
            const uint64_t at = in_.position();
            value.n = in_.read<uint64_t>("the length of the array");
            in_.check_count(value.n, is_text(value) ? 8 : size_of(value.type), "elements", at);
        }
        read_payload(value);
        out_.values.push_back(std::move(value));
    }

    GgufType read_type() {
        const uint64_t at = in_.position();
        const auto type = in_.read<uint32_t>("the type of its value");
        if (type >= n_types) {
            in_.fail(at, "the type of its value is " + std::to_string(type) + ", which is no GGUF type (0 to 12)");
        }
        return static_cast<GgufType>(type);
    }

    static bool is_text(const GgufValue & value) { return value.type == GgufType::string; }

    void read_payload(GgufValue & value) {
        value.offset = in_.position();
        if (is_text(value) && !value.is_array) {
            const auto n = in_.read<uint64_t>("the length of its text");
            value.offset = in_.position();
            in_.take(n, "its text");
        } else if (is_text(value)) {
            for (uint64_t i = 0; i < value.n; ++i) {
                in_.read_text("a string in its array");
            }
        } else {
            const uint8_t * bytes = in_.take(value.n * size_of(value.type), "its value"); // count checked: no overflow
            for (uint64_t i = 0; value.type == GgufType::boolean && i < value.n; ++i) {
                if (bytes[i] > 1) {
                    in_.fail(value.offset + i, "a bool must be 0 or 1 and is " + std::to_string(bytes[i]));
                }
            }
        }
        value.n_bytes = in_.position() - value.offset;
    }

    void read_alignment() {
        const auto found = out_.value_index.find("general.alignment");
        if (found == out_.value_index.end()) {
            return;
        }
        const GgufValue & value = out_.values[found->second];
        in_.set_field("key 'general.alignment'");
        if (value.type != GgufType::u32 || value.is_array) {
            in_.fail(value.offset, "must be a u32 and is " + describe(value));
        }
        uint32_t alignment;
        std::memcpy(&alignment, data_ + value.offset, sizeof(alignment));
        if (alignment < 8 || (alignment & (alignment - 1)) != 0) {
            in_.fail(value.offset, "is " + std::to_string(alignment) + " and must be a power of two, 8 or more");
        }
        alignment_ = alignment;
    }

    void read_tensor(uint64_t number) {
        const uint64_t start = in_.position();
        in_.set_field("tensor number " + std::to_string(number));
        const std::string_view name = in_.read_text("its name");
        if (name.empty() || name.size() >= GGML_MAX_NAME) {
            in_.fail(start, "its name is " + std::to_string(name.size()) + " bytes long (1 to " +
                                std::to_string(GGML_MAX_NAME - 1) + " are allowed)");
        }
        if (!is_printable(name)) {
            in_.fail(start, "its name " + quoted(name) + " is not plain ASCII");
        }
        in_.set_field("tensor " + quoted(name));
        if (!out_.tensor_index.emplace(name, out_.tensors.size()).second) {
            in_.fail(start, "the tensor is there twice");
        }

        GgufTensor tensor{std::string(name), GGML_TYPE_F32, {1, 1, 1, 1}, 0, 0};
        const uint64_t shape_at = in_.position();
        const auto n_dims = in_.read<uint32_t>("its number of dimensions");
        if (n_dims < 1 || n_dims > 4) {
            in_.fail(shape_at, "has " + std::to_string(n_dims) + " dimensions (1 to 4 are allowed)");
        }
        int64_t n_elements = 1;
        for (uint32_t i = 0; i < n_dims; ++i) {
            tensor.ne[i] = in_.read<int64_t>("its shape");
            if (tensor.ne[i] < 1) {
                in_.fail(shape_at, "its dimension " + std::to_string(i) + " is " + std::to_string(tensor.ne[i]) +
                                       " and must be at least 1");
            }
            if (__builtin_mul_overflow(n_elements, tensor.ne[i], &n_elements)) {
                in_.fail(shape_at, "its shape has more elements than 64 bits can count");
            }
        }

        const uint64_t type_at = in_.position();
        const auto type = in_.read<uint32_t>("its type");
        // ggml keeps the numbers of retired types, with blocks of no elements and a name that says what came instead.
        const bool in_range = type < GGML_TYPE_COUNT;
        const int64_t block = in_range ? ggml_blck_size(static_cast<ggml_type>(type)) : 0;
        if (block == 0) {
            in_.fail(type_at,
                     "its type is number " + std::to_string(type) + ", which ggml " + ggml_version() +
                         " does not have: the file is damaged, outdated or newer than this runtime",
                     PF_ERR_UNSUPPORTED);
        }
        tensor.type = static_cast<ggml_type>(type);
        if (tensor.ne[0] % block != 0) {
            in_.fail(shape_at, "its rows of " + std::to_string(tensor.ne[0]) + " elements are no whole number of " +
                                   ggml_type_name(tensor.type) + " blocks of " + std::to_string(block));
        }
        const auto n_blocks = static_cast<uint64_t>(n_elements / block);
        if (__builtin_mul_overflow(n_blocks, ggml_type_size(tensor.type), &tensor.size)) {
            in_.fail(shape_at, "its size in bytes does not fit 64 bits");
        }
        tensor.offset = in_.read<uint64_t>("its offset"); // from the start of the data, until place_tensors()
        tensor_at_.push_back(start);
        out_.tensors.push_back(std::move(tensor));
    }

    // From offsets within the data region to offsets within the file, checking that each tensor lies wholly in the file
    // and that no two share a byte. Gaps between them are allowed.
    void place_tensors() {
        const uint64_t size = in_.size();
        const uint64_t data = (in_.position() + alignment_ - 1) / alignment_ * alignment_; // at most 2^63 + 2^31
        for (size_t i = 0; i < out_.tensors.size(); ++i) {
            GgufTensor & tensor = out_.tensors[i];
            in_.set_field("tensor " + quoted(tensor.name));
            if (tensor.offset % alignment_ != 0) {
                in_.fail(tensor_at_[i], "its data offset " + std::to_string(tensor.offset) +
                                            " is no multiple of the file's alignment, " + std::to_string(alignment_));
            }
            if (data > size || tensor.offset > size - data || tensor.size > size - data - tensor.offset) {
                in_.fail(tensor_at_[i], "its " + std::to_string(tensor.size) + " bytes at offset " +
                                            std::to_string(tensor.offset) + " of the data, which starts at byte " +
                                            std::to_string(data) + ", end past the file's " + std::to_string(size) +
                                            " bytes: the file is truncated, download it again");
            }
            tensor.offset += data;
        }

        std::vector<size_t> order(out_.tensors.size());
        for (size_t i = 0; i < order.size(); ++i) {
            order[i] = i;
        }
        const std::vector<GgufTensor> & tensors = out_.tensors;
        std::sort(order.begin(), order.end(),
                  [&](size_t a, size_t b) { return tensors[a].offset < tensors[b].offset; });
        // No tensor is empty, so if any two overlap, two neighbours in this order do.
        for (size_t i = 1; i < order.size(); ++i) {
            const GgufTensor & before = tensors[order[i - 1]];
            if (before.offset + before.size > tensors[order[i]].offset) {
                in_.set_field("tensor " + quoted(tensors[order[i]].name));
                in_.fail(tensor_at_[order[i]], "its data overlaps that of tensor " + quoted(before.name));
            }
        }
    }

    Cursor in_;
    const uint8_t * data_;
    GgufContents out_;
    uint64_t n_values_ = 0;
    uint64_t n_tensors_ = 0;
    uint64_t alignment_ = default_alignment;
    std::vector<uint64_t> tensor_at_; // where each tensor's header stands in the file
};

} // namespace

const char * type_name(GgufType type) {
    return type_facts[static_cast<uint32_t>(type)].name;
}

std::string describe(const GgufValue & value) {
    if (value.is_array) {
        return "an array of " + std::to_string(value.n) + " " + type_name(value.type);
    }
    return std::string("of type ") + type_name(value.type);
}

uint64_t size_of(GgufType type) {
    return type_facts[static_cast<uint32_t>(type)].size;
}

GgufContents parse_gguf(const std::string & path, const uint8_t * data, uint64_t size) {
    return Parser(path, data, size).parse();
}

} // namespace pf
