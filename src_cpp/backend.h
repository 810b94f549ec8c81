// Devices: the CPU, and the first CUDA device where a CUDA backend lies beside libpydflash and can be used here. A backend
// is a library, loaded once for the process from libpydflash's own folder. Nothing else is ever searched: no working
// folder, no environment variable.
#pragma once

#include <string>

#include "ggml-backend.h"

namespace pf {

// The CPU, through the library that suits this processor. Any thread may ask; throws Error when none can be loaded.
ggml_backend_dev_t cpu_device();

// A device by the name a user gives it: "cpu", "cuda", or "auto", which stands for "cuda" where that can be had and for
// "cpu" elsewhere. Throws PF_ERR_ARGUMENT for any other name, PF_ERR_DEVICE when there is no CUDA device to be had, with
// the loader's own words.
ggml_backend_dev_t find_device(const std::string & name);

// Why "auto" stands for the CPU though a CUDA backend is installed; else empty.
std::string why_auto_is_cpu();

// Whether what lies in the device's memory can be read through a pointer.
bool is_host(ggml_backend_dev_t device);

// A function of the CPU backend that ggml offers by name only (ggml_threadpool_new, ggml_backend_set_n_threads, ...).
// Never null: throws Error when the backend has no function of that name.
void * cpu_proc(const char * name);

// What ggml complained of on this thread since the last call; it would otherwise go to stderr. For error sentences.
std::string take_ggml_log();

} // namespace pf
