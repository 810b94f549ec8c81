// How much memory this process may still take on the host.
#pragma once

#include <cstdint>

namespace pf {

// Bytes that can be had without swapping, within the limit of this process' control group where there is one. Pages of
// mapped files, models among them, count as free: they are read again when they are needed.
uint64_t free_host_memory();

} // namespace pf
