// The inside of a GgufFile, for file.cpp and the C interface alone.
#pragma once

#include <mutex>
#include <unordered_map>

#include "gguf/contents.h"

namespace pf {

// The strings of an array, one after another: string i is text[offsets[i]] .. text[offsets[i + 1]].
struct JoinedStrings {
    std::string text;
    std::vector<uint64_t> offsets; // [n + 1]
};

struct GgufFile::Impl {
    Impl(const std::string & path, Bytes bytes)
        : path(path), bytes(std::move(bytes)), contents(parse_gguf(path, this->bytes.data.get(), this->bytes.size)) {}

    const GgufValue * find(std::string_view key) const;
    const GgufValue & need(std::string_view key) const;
    [[noreturn]] void fail(const GgufValue & value, const std::string & sentence) const;
    [[noreturn]] void fail_type(const GgufValue & value, const char * expected) const;

    // Element i of a value of any integer type, or of bools.
    int64_t integer(const GgufValue & value, uint64_t i) const;
    double real(const GgufValue & value) const;
    std::string_view text(const GgufValue & value) const;
    const JoinedStrings & strings(const GgufValue & value) const; // joined at the first call; safe from any thread

    const std::string path;
    const Bytes bytes;
    const GgufContents contents;

  private:
    mutable std::mutex joined_mutex_;
    mutable std::unordered_map<const GgufValue *, JoinedStrings> joined_;
};

struct GgufAccess {
    using Impl = GgufFile::Impl;
    static const GgufFile::Impl & impl(const GgufFile & file) { return *file.impl_; }
    // A file that never was on disk; `path` is only what its errors call it. For the fuzzer.
    static std::shared_ptr<const GgufFile> over(Bytes bytes, const std::string & path);
};

} // namespace pf
