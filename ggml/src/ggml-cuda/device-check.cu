// Whether this library's kernels can run on a device at all. A library holds machine code for the architectures that it
// was compiled for; on any other card the first launch would end the process, so a loader asks this first.
#include "ggml-backend.h"

static __global__ void probe() {}

extern "C" GGML_BACKEND_API const char * pydflash_cuda_unfit(int device);

// Null when they can, else the CUDA runtime's own words. Loads one empty kernel and launches nothing.
const char * pydflash_cuda_unfit(int device) {
    cudaFuncAttributes attributes;
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess) {
        error = cudaFuncGetAttributes(&attributes, probe);
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
