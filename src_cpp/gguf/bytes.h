// A file's bytes, mapped read-only and never written through. Refuses what is not an ordinary, readable, non-empty file.
// A file that another process shortens while it is mapped is out of scope: touching the lost pages is a SIGBUS, as with
// any mapping. Replace model files by renaming a new one over them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace pf {

struct Bytes {
    std::shared_ptr<const uint8_t> data;
    uint64_t size;
};

// Nothing is read until it is touched, so a file of any size opens at once.
Bytes map_file(const std::string & path);

} // namespace pf
