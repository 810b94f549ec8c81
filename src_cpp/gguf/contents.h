// What a GGUF file says of itself: its keys, with where their values lie, and its tensors. parse_gguf() is the only
// reader of untrusted bytes; what it returns was checked whole, so nothing after it needs to check again.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "gguf/bytes.h"
#include "gguf/file.h"

namespace pf {

// GGUF's numbering.
enum class GgufType : uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };

const char * type_name(GgufType type);
uint64_t size_of(GgufType type); // bytes of one value; 0 for strings and arrays

struct GgufValue {
    std::string key;
    GgufType type; // of the value or, in an array, of its elements
    bool is_array;
    uint64_t n;       // elements; 1 for a single value
    uint64_t offset;  // of the first byte from the start of the file; a single string's text, past its length
    uint64_t n_bytes; // from there to the end of the value; strings in an array carry their lengths
};

std::string describe(const GgufValue & value); // "of type u32", "an array of 3 string"

struct GgufContents {
    std::vector<GgufValue> values; // in the file's order
    std::vector<GgufTensor> tensors;
    // Names as they stand in the file's bytes, which must outlive this.
    std::unordered_map<std::string_view, size_t> value_index;
    std::unordered_map<std::string_view, size_t> tensor_index;
};

GgufContents parse_gguf(const std::string & path, const uint8_t * data, uint64_t size);

} // namespace pf
