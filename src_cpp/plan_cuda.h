// What ggml-cuda would allocate, for planning a CUDA device on a machine without one: a buffer type that knows alignment
// and sizes, and gives no memory. Where there is a device, its own buffer type is asked instead.
#pragma once

#include "ggml-backend.h"

namespace pf {

// Flash attention over several queries keeps the K and V it is shown, in f16, behind its result.
ggml_backend_buffer_type_t cuda_plan_type();

// The sizes of `type`, less what flash attention keeps behind its result.
ggml_backend_buffer_type_t without_copies(ggml_backend_buffer_type_t type);

} // namespace pf
