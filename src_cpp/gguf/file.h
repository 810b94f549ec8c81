// A GGUF file, memory-mapped, with every key, type, length, shape, offset and size checked before anyone sees it.
// Refuses what is malformed with a sentence that names file, field and offset; never trusts a count from the file.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "ggml.h"

namespace pf {

struct GgufTensor {
    std::string name;
    ggml_type type;
    int64_t ne[4];   // ggml order
    uint64_t offset; // from the start of the file
    uint64_t size;   // bytes, all inside the file
};

class GgufFile {
  public:
    static std::shared_ptr<const GgufFile> open(const std::string & path);
    ~GgufFile();

    const std::string & path() const;
    const uint8_t * data() const; // the whole file, mapped read-only
    uint64_t size() const;

    bool has(std::string_view key) const;
    // The value of a key; a missing key or one of another type is a PF_ERR_FORMAT that names both. Integers come from
    // any integer type, range-checked to [lo, hi]; floats from f32 or f64, finite as a float too; the forms with a
    // default return it when the key is absent.
    int64_t get_int(std::string_view key, int64_t lo, int64_t hi) const;
    int64_t get_int(std::string_view key, int64_t lo, int64_t hi, int64_t absent) const;
    double get_float(std::string_view key) const;
    double get_float(std::string_view key, double absent) const;
    bool get_bool(std::string_view key, bool absent) const;
    std::string get_string(std::string_view key) const;
    std::vector<int64_t> get_ints(std::string_view key) const; // an array of any integer type or bools
    uint64_t array_size(std::string_view key) const;           // 0 when absent

    const std::vector<GgufTensor> & tensors() const;
    const GgufTensor * find(std::string_view name) const; // nullptr when absent

  private:
    struct Impl;
    explicit GgufFile(std::unique_ptr<Impl> impl);
    std::unique_ptr<Impl> impl_;
    friend struct GgufAccess; // the C interface's view (raw arrays, key order)
};

} // namespace pf
