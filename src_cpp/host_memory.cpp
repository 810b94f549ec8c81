#include "host_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace pf {

namespace {

// The number behind `key` in a file of keys and values; without a key the file's first word. Nothing when that is no
// number, as the "max" of a control group without a limit.
std::optional<uint64_t> read_number(const std::string & path, const std::string & key = "") {
    std::ifstream in(path);
    std::string word;
    uint64_t n = 0;
    while (!key.empty() && in >> word && word != key) {
    }
    return in >> n ? std::optional<uint64_t>(n) : std::nullopt;
}

// What a control group leaves: its limit less what it uses other than for files.
uint64_t free_in_group(const std::string & limit, const std::string & used, const std::string & stat,
                       const std::string & file_key) {
    const auto most = read_number(limit), now = read_number(used);
    if (!most || !now) {
        return std::numeric_limits<uint64_t>::max();
    }
    const uint64_t taken = *now - std::min(*now, read_number(stat, file_key).value_or(0));
    return *most - std::min(*most, taken);
}

std::mutex mutex;
std::map<void *, size_t> promised; // pages and their bytes

// Of what was promised, what nobody has written yet.
uint64_t untouched_bytes() {
    const std::lock_guard<std::mutex> lock(mutex);
    const size_t page = (size_t) sysconf(_SC_PAGESIZE);
    uint64_t total = 0;
    for (const auto & [pages, n_bytes] : promised) {
        std::vector<unsigned char> resident((n_bytes + page - 1) / page);
        if (mincore(pages, n_bytes, resident.data()) == 0) {
            total += page * (uint64_t) std::count_if(resident.begin(), resident.end(),
                                                     [](unsigned char flags) { return (flags & 1) == 0; });
        }
    }
    return total;
}

} // namespace

void * map_pages(size_t n_bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    void * pages = mmap(nullptr, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) {
        return nullptr;
    }
    promised[pages] = n_bytes;
    return pages;
}

void unmap_pages(void * pages) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = promised.find(pages);
    if (found != promised.end()) {
        munmap(pages, found->second);
        promised.erase(found);
    }
}

uint64_t free_host_memory() {
    const std::string v2 = "/sys/fs/cgroup/", v1 = "/sys/fs/cgroup/memory/";
    const auto available = read_number("/proc/meminfo", "MemAvailable:"); // KiB
    const uint64_t free = std::min({
        available ? *available * 1024 : std::numeric_limits<uint64_t>::max(),
        free_in_group(v2 + "memory.max", v2 + "memory.current", v2 + "memory.stat", "file"),
        free_in_group(v1 + "memory.limit_in_bytes", v1 + "memory.usage_in_bytes", v1 + "memory.stat", "total_cache"),
    });
    return free - std::min(free, untouched_bytes());
}

} // namespace pf
