// Memory of the host: how much this process may still take, and pages that are taken only when they are written.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pf {

// Bytes that can be had without swapping, within the limit of this process' control group where there is one. Pages of
// mapped files, models among them, count as free: they are read again when they are needed. What map_pages has promised
// does not, whether it has been written or not.
uint64_t free_host_memory();

// Fresh pages, all zero, which cost nothing until they are written; null when there are none to be had.
void * map_pages(size_t n_bytes);
void unmap_pages(void * pages);

} // namespace pf
