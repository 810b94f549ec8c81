#include "gguf/bytes.h"

#include <cerrno>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <system_error>
#include <unistd.h>

#include "error.h"

namespace pf {

namespace {

struct Descriptor {
    int fd;
    ~Descriptor() {
        if (fd >= 0) {
            ::close(fd);
        }
    }
};

[[noreturn]] void fail_system(const std::string & path, const char * what) {
    const int code = errno;
    throw Error(PF_ERR_FILE, path + ": " + what + ": " + std::generic_category().message(code));
}

} // namespace

Bytes map_file(const std::string & path) {
    // O_NONBLOCK: opening a pipe nobody writes to must not wait. It means nothing for ordinary files.
    const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK)};
    if (file.fd < 0) {
        fail_system(path, "the file can't be opened");
    }
    struct stat info;
    if (::fstat(file.fd, &info) != 0) {
        fail_system(path, "the file can't be examined");
    }
    if (S_ISDIR(info.st_mode)) {
        throw Error(PF_ERR_FILE, path + ": is a folder; name the .gguf file inside it");
    }
    if (!S_ISREG(info.st_mode)) {
        throw Error(PF_ERR_FILE, path + ": is not an ordinary file, so it can't be mapped into memory");
    }
    if (info.st_size == 0) {
        throw Error(PF_ERR_FORMAT, path + ": the file is empty: download it again");
    }
    const auto size = static_cast<uint64_t>(info.st_size);
    void * address = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, file.fd, 0);
    if (address == MAP_FAILED) {
        fail_system(path, "the file can't be mapped into memory");
    }
    auto unmap = [size](const uint8_t * p) { ::munmap(const_cast<uint8_t *>(p), size); };
    return {std::shared_ptr<const uint8_t>(static_cast<const uint8_t *>(address), unmap), size};
}

} // namespace pf
