// ggml's CPU backend: a library beside libpydflash, chosen for this processor and loaded once for the process.
// Nothing else is ever searched: no working folder, no environment variable.
#pragma once

#include <string>

#include "ggml-backend.h"

namespace pf {

// The CPU as a ggml device. Any thread may ask; throws Error when no library beside ours can be loaded.
ggml_backend_dev_t cpu_device();

// A function of the CPU backend that ggml offers by name only (ggml_threadpool_new, ggml_backend_set_n_threads, ...).
// Never null: throws Error when the backend has no function of that name.
void * cpu_proc(const char * name);

// What ggml complained of on this thread since the last call; it would otherwise go to stderr. For error sentences.
std::string take_ggml_log();

} // namespace pf
