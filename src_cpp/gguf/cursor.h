// Reading position in a GGUF file's bytes. Every byte the parser looks at comes out of take(), which refuses to step
// past the end; every complaint leaves through fail(), which says file, field and offset in one form:
//
//   <path>: <field> at byte <offset>: <what is wrong and, where that is clear, what to do>
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>

#include "error.h"

namespace pf {

// Text from a file, made fit for a sentence: printable ASCII stays, the rest becomes \xNN, and long text is cut.
inline std::string quoted(std::string_view text) {
    constexpr size_t shown = 80;
    static const char hex[] = "0123456789abcdef";
    std::string out = "'";
    for (const unsigned char c : text.substr(0, shown)) {
        if (c >= 0x20 && c < 0x7f) {
            out += static_cast<char>(c);
        } else {
            out += {'\\', 'x', hex[c >> 4], hex[c & 15]};
        }
    }
    return out + (text.size() > shown ? "...'" : "'");
}

inline bool is_printable(std::string_view text) {
    for (const unsigned char c : text) {
        if (c < 0x20 || c >= 0x7f) {
            return false;
        }
    }
    return true;
}

class Cursor {
  public:
    Cursor(const std::string & path, const uint8_t * data, uint64_t size) : path_(path), data_(data), size_(size) {}

    uint64_t position() const { return position_; }
    uint64_t left() const { return size_ - position_; }
    uint64_t size() const { return size_; }
    // What is being read, for fail(): "the header", "key 'general.name'", "tensor 'fc.weight'".
    void set_field(std::string field) { field_ = std::move(field); }

    // The next n bytes. position_ <= size_ always holds, so the subtraction can't wrap, whatever n the file claims.
    const uint8_t * take(uint64_t n, const char * what) {
        if (n > size_ - position_) {
            fail(position_, std::string(what) + " takes " + std::to_string(n) + " bytes where " +
                                std::to_string(left()) +
                                " are left: the file is truncated or damaged, download it again");
        }
        const uint8_t * bytes = data_ + position_;
        position_ += n;
        return bytes;
    }

    template <class T>
    T read(const char * what) {
        T value;
        std::memcpy(&value, take(sizeof(T), what), sizeof(T));
        return value;
    }

    // Text as GGUF writes it: a u64 length, then that many bytes.
    std::string_view read_text(const char * what) {
        const auto n = read<uint64_t>(what);
        return {reinterpret_cast<const char *>(take(n, what)), n};
    }

    // Refuses a count of things that could not fit in the rest of the file, each taking `n_bytes` at least.
    void check_count(uint64_t n, uint64_t n_bytes, const char * things, uint64_t offset) const {
        if (n > left() / n_bytes) {
            fail(offset, "announces " + std::to_string(n) + " " + things + ", but the " + std::to_string(left()) +
                             " bytes that follow can't hold them: the file is truncated or damaged, download it again");
        }
    }

    [[noreturn]] void fail(uint64_t offset, const std::string & sentence, int code = PF_ERR_FORMAT) const {
        throw Error(code, path_ + ": " + field_ + " at byte " + std::to_string(offset) + ": " + sentence);
    }

  private:
    const std::string & path_;
    const uint8_t * data_;
    uint64_t size_;
    uint64_t position_ = 0;
    std::string field_ = "the header";
};

} // namespace pf
