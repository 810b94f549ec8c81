#include "gguf/file.h"

#include <cfloat>
#include <cmath>
#include <cstring>

#include "gguf/cursor.h"
#include "gguf/impl.h"

namespace pf {

namespace {

template <class T>
T load(const uint8_t * bytes) {
    T value;
    std::memcpy(&value, bytes, sizeof(T));
    return value;
}

bool is_integer(GgufType type) {
    switch (type) {
    case GgufType::f32:
    case GgufType::f64:
    case GgufType::boolean:
    case GgufType::string:
    case GgufType::array:
        return false;
    default:
        return true;
    }
}

} // namespace

// ---- inside ----------------------------------------------------------------------------------------------------

const GgufValue * GgufFile::Impl::find(std::string_view key) const {
    const auto found = contents.value_index.find(key);
    return found == contents.value_index.end() ? nullptr : &contents.values[found->second];
}

const GgufValue & GgufFile::Impl::need(std::string_view key) const {
    const GgufValue * value = find(key);
    if (!value) {
        throw Error(PF_ERR_FORMAT, path + ": key " + quoted(key) + " is missing");
    }
    return *value;
}

void GgufFile::Impl::fail(const GgufValue & value, const std::string & sentence) const {
    throw Error(PF_ERR_FORMAT,
                path + ": key " + quoted(value.key) + " at byte " + std::to_string(value.offset) + ": " + sentence);
}

void GgufFile::Impl::fail_type(const GgufValue & value, const char * expected) const {
    fail(value, std::string("must be ") + expected + " and is " + describe(value));
}

int64_t GgufFile::Impl::integer(const GgufValue & value, uint64_t i) const {
    const uint8_t * at = bytes.data.get() + value.offset + i * size_of(value.type);
    switch (value.type) {
    case GgufType::u8:
    case GgufType::boolean:
        return load<uint8_t>(at);
    case GgufType::i8:
        return load<int8_t>(at);
    case GgufType::u16:
        return load<uint16_t>(at);
    case GgufType::i16:
        return load<int16_t>(at);
    case GgufType::u32:
        return load<uint32_t>(at);
    case GgufType::i32:
        return load<int32_t>(at);
    case GgufType::i64:
        return load<int64_t>(at);
    case GgufType::u64: {
        const auto wide = load<uint64_t>(at);
        if (wide > INT64_MAX) {
            fail(value, "is " + std::to_string(wide) + ", which does not fit a signed 64-bit integer");
        }
        return static_cast<int64_t>(wide);
    }
    default:
        fail_type(value, "an integer");
    }
}

double GgufFile::Impl::real(const GgufValue & value) const {
    const uint8_t * at = bytes.data.get() + value.offset;
    if (!value.is_array && value.type == GgufType::f32) {
        return load<float>(at);
    }
    if (!value.is_array && value.type == GgufType::f64) {
        return load<double>(at);
    }
    fail_type(value, "a float");
}

std::string_view GgufFile::Impl::text(const GgufValue & value) const {
    if (value.is_array || value.type != GgufType::string) {
        fail_type(value, "a string");
    }
    return {reinterpret_cast<const char *>(bytes.data.get()) + value.offset, value.n_bytes};
}

const JoinedStrings & GgufFile::Impl::strings(const GgufValue & value) const {
    if (!value.is_array || value.type != GgufType::string) {
        fail_type(value, "an array of strings");
    }
    const std::lock_guard<std::mutex> lock(joined_mutex_);
    const auto found = joined_.find(&value);
    if (found != joined_.end()) {
        return found->second;
    }
    JoinedStrings joined;
    joined.text.reserve(value.n_bytes - 8 * value.n);
    joined.offsets.reserve(value.n + 1);
    joined.offsets.push_back(0);
    const uint8_t * at = bytes.data.get() + value.offset; // the parser walked these lengths already
    for (uint64_t i = 0; i < value.n; ++i) {
        const auto n = load<uint64_t>(at);
        joined.text.append(reinterpret_cast<const char *>(at) + 8, n);
        joined.offsets.push_back(joined.text.size());
        at += 8 + n;
    }
    return joined_.emplace(&value, std::move(joined)).first->second; // nodes of this map never move
}

std::shared_ptr<const GgufFile> GgufAccess::over(Bytes bytes, const std::string & path) {
    return std::shared_ptr<const GgufFile>(new GgufFile(std::make_unique<GgufFile::Impl>(path, std::move(bytes))));
}

// ---- outside ---------------------------------------------------------------------------------------------------

GgufFile::GgufFile(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
GgufFile::~GgufFile() = default;

std::shared_ptr<const GgufFile> GgufFile::open(const std::string & path) {
    return GgufAccess::over(map_file(path), path);
}

const std::string & GgufFile::path() const {
    return impl_->path;
}

const uint8_t * GgufFile::data() const {
    return impl_->bytes.data.get();
}

uint64_t GgufFile::size() const {
    return impl_->bytes.size;
}

bool GgufFile::has(std::string_view key) const {
    return impl_->find(key) != nullptr;
}

int64_t GgufFile::get_int(std::string_view key, int64_t lo, int64_t hi) const {
    const GgufValue & value = impl_->need(key);
    if (value.is_array || !is_integer(value.type)) {
        impl_->fail_type(value, "an integer");
    }
    const int64_t number = impl_->integer(value, 0);
    if (number < lo || number > hi) {
        impl_->fail(value,
                    "is " + std::to_string(number) + ", outside " + std::to_string(lo) + " to " + std::to_string(hi));
    }
    return number;
}

int64_t GgufFile::get_int(std::string_view key, int64_t lo, int64_t hi, int64_t absent) const {
    return has(key) ? get_int(key, lo, hi) : absent;
}

double GgufFile::get_float(std::string_view key) const {
    const GgufValue & value = impl_->need(key);
    const double number = impl_->real(value);
    if (!(std::fabs(number) <= FLT_MAX)) { // a NaN compares false
        impl_->fail(value, "is not a finite number that fits an f32");
    }
    return number;
}

double GgufFile::get_float(std::string_view key, double absent) const {
    return has(key) ? get_float(key) : absent;
}

bool GgufFile::get_bool(std::string_view key, bool absent) const {
    const GgufValue * value = impl_->find(key);
    if (!value) {
        return absent;
    }
    if (value->is_array || value->type != GgufType::boolean) {
        impl_->fail_type(*value, "a bool");
    }
    return impl_->integer(*value, 0) != 0;
}

std::string GgufFile::get_string(std::string_view key) const {
    return std::string(impl_->text(impl_->need(key)));
}

std::vector<int64_t> GgufFile::get_ints(std::string_view key) const {
    const GgufValue & value = impl_->need(key);
    if (!value.is_array || !(is_integer(value.type) || value.type == GgufType::boolean)) {
        impl_->fail_type(value, "an array of integers");
    }
    std::vector<int64_t> out(value.n);
    for (uint64_t i = 0; i < value.n; ++i) {
        out[i] = impl_->integer(value, i);
    }
    return out;
}

uint64_t GgufFile::array_size(std::string_view key) const {
    const GgufValue * value = impl_->find(key);
    if (!value) {
        return 0;
    }
    if (!value->is_array) {
        impl_->fail_type(*value, "an array");
    }
    return value->n;
}

const std::vector<GgufTensor> & GgufFile::tensors() const {
    return impl_->contents.tensors;
}

const GgufTensor * GgufFile::find(std::string_view name) const {
    const auto found = impl_->contents.tensor_index.find(name);
    return found == impl_->contents.tensor_index.end() ? nullptr : &impl_->contents.tensors[found->second];
}

} // namespace pf
