#include "host_memory.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <optional>
#include <string>

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

} // namespace

uint64_t free_host_memory() {
    const std::string v2 = "/sys/fs/cgroup/", v1 = "/sys/fs/cgroup/memory/";
    const auto available = read_number("/proc/meminfo", "MemAvailable:"); // KiB
    return std::min({
        available ? *available * 1024 : std::numeric_limits<uint64_t>::max(),
        free_in_group(v2 + "memory.max", v2 + "memory.current", v2 + "memory.stat", "file"),
        free_in_group(v1 + "memory.limit_in_bytes", v1 + "memory.usage_in_bytes", v1 + "memory.stat", "total_cache"),
    });
}

} // namespace pf
