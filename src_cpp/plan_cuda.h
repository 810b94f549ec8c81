// What ggml-cuda would allocate, for planning a CUDA device on a machine without one: buffer types that know the
// alignment and the sizes, and give no memory. Where there is a device, its own buffer type is asked instead.
#pragma once

#include "ggml-backend.h"

namespace pf {

// with_copy: flash attention keeps the K and V it is shown, in f16, behind its result.
ggml_backend_buffer_type_t cuda_plan_type(bool with_copy);

} // namespace pf
