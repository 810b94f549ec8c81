// The driver's header: nothing of it is used without virtual memory management (GGML_CUDA_NO_VMM).
#pragma once
