// A CUDA machine on which nothing is computed: the runtime, the driver and cuBLAS as far as ggml-cuda calls them.
//
// One device of compute capability 8.6 with 82 multiprocessors, whose memory is never written: launches and copies are
// counted and do nothing, and what is copied back is zero. Allocations beyond NULL_CUDA_MIB (24240, what a 24 GiB card
// leaves) fail. So the real library's host side runs whole sessions without a GPU: which ops it takes, what it
// allocates, what it copies, when it captures and replays graphs. What it says about results is nothing.
//
// Built as one library that goes by three names: libcudart.so.13, libcublas.so.13, libcuda.so.1.
#include <cuda.h>
#include <cuda_runtime.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace {

enum Counter {
    launches,
    graph_launches,
    captures,
    products, // by cuBLAS
    bytes_to_device,
    bytes_to_host,
    bytes_held,
    bytes_peak,
    n_counters
};

uint64_t counters[n_counters];
std::mutex mutex;
std::map<uintptr_t, size_t> blocks; // of cudaMalloc
bool capturing = false;
char dummy; // what every handle points at

uint64_t limit() {
    const char * mib = getenv("NULL_CUDA_MIB");
    return (mib ? strtoull(mib, nullptr, 10) : 24240) << 20;
}

bool hold(size_t size) {
    if (counters[bytes_held] + size > limit()) {
        return false;
    }
    counters[bytes_held] += size;
    counters[bytes_peak] = counters[bytes_peak] > counters[bytes_held] ? counters[bytes_peak] : counters[bytes_held];
    return true;
}

void * map_memory(size_t size) {
    void * base = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return base == MAP_FAILED ? nullptr : base;
}

template <class T>
cudaError_t give(T * out) {
    *out = reinterpret_cast<T>(&dummy);
    return cudaSuccess;
}

cudaError_t copy(void * to, const void * from, size_t size, cudaMemcpyKind kind) {
    counters[bytes_to_device] += kind == cudaMemcpyHostToDevice ? size : 0;
    counters[bytes_to_host] += kind == cudaMemcpyDeviceToHost ? size : 0;
    if (kind == cudaMemcpyDeviceToHost) {
        memset(to, 0, size);
    }
    (void) from;
    return cudaSuccess;
}

int attribute(int which) {
    switch (which) {
    case cudaDevAttrComputeCapabilityMajor:
        return 8;
    case cudaDevAttrComputeCapabilityMinor:
        return 6;
    case cudaDevAttrMultiProcessorCount:
        return 82;
    case cudaDevAttrWarpSize:
        return 32;
    case cudaDevAttrMaxSharedMemoryPerBlock:
        return 48 << 10;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        return 99 << 10;
    default:
        return 1; // a capability: there
    }
}

} // namespace

extern "C" {

void null_cuda_counters(uint64_t * out) {
    memcpy(out, counters, sizeof(counters));
}

// ---- devices -----------------------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int * count) {
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int * device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int) {
    return cudaSuccess;
}
cudaError_t cudaSetDeviceFlags(unsigned) {
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp * p, int) {
    *p = {};
    strcpy(p->name, "Null GPU");
    p->totalGlobalMem = limit();
    p->major = 8;
    p->minor = 6;
    p->multiProcessorCount = 82;
    p->warpSize = 32;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = 99 << 10;
    p->sharedMemPerMultiprocessor = 100 << 10;
    p->regsPerBlock = 65536;
    p->regsPerMultiprocessor = 65536;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 1536;
    p->l2CacheSize = 6 << 20;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int * value, cudaDeviceAttr which, int) {
    *value = attribute(which);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char * id, int size, int) {
    strncpy(id, "0000:01:00.0", (size_t) size);
    return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int * can, int, int) {
    *can = 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) {
    return cudaSuccess;
}
cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
cudaError_t cudaPeekAtLastError() {
    return cudaSuccess;
}
const char * cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "no error";
}

// ---- memory ------------------------------------------------------------------------------------------------------

cudaError_t cudaMemGetInfo(size_t * free, size_t * total) {
    *free = limit() - counters[bytes_held];
    *total = limit();
    return cudaSuccess;
}
cudaError_t cudaMalloc(void ** out, size_t size) {
    const std::lock_guard<std::mutex> lock(mutex);
    *out = hold(size) ? map_memory(size) : nullptr;
    if (!*out) {
        return cudaErrorMemoryAllocation;
    }
    blocks[(uintptr_t) *out] = size;
    return cudaSuccess;
}
cudaError_t cudaMallocManaged(void ** out, size_t size, unsigned) {
    return cudaMalloc(out, size);
}
cudaError_t cudaFree(void * base) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = blocks.find((uintptr_t) base);
    if (found != blocks.end()) {
        munmap(base, found->second);
        counters[bytes_held] -= found->second;
        blocks.erase(found);
    }
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void ** out, size_t size) {
    *out = calloc(1, size);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void ** out, size_t size, unsigned) {
    return cudaMallocHost(out, size);
}
cudaError_t cudaFreeHost(void * base) {
    free(base);
    return cudaSuccess;
}
cudaError_t cudaHostRegister(void *, size_t, unsigned) {
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *) {
    return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void ** device, void * host, unsigned) {
    *device = host;
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void * to, const void * from, size_t size, cudaMemcpyKind kind, cudaStream_t) {
    return copy(to, from, size, kind);
}
cudaError_t cudaMemcpy2DAsync(void * to, size_t to_pitch, const void * from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t) {
    for (size_t i = 0; i < height; ++i) {
        copy((char *) to + i * to_pitch, (const char *) from + i * from_pitch, width, kind);
    }
    return cudaSuccess;
}
cudaError_t cudaMemcpyPeerAsync(void * to, int, const void * from, int, size_t size, cudaStream_t) {
    return copy(to, from, size, cudaMemcpyDeviceToDevice);
}
cudaError_t cudaMemset(void *, int, size_t) { // memory is zero from the start, and zero is all that is ever set
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *, int, size_t, cudaStream_t) {
    return cudaSuccess;
}

CUresult cuDeviceGet(CUdevice * device, int) {
    *device = 0;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int * value, CUdevice_attribute, CUdevice) {
    *value = 1;
    return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char ** text) {
    *text = "no error";
    return CUDA_SUCCESS;
}
CUresult cuMemGetAllocationGranularity(size_t * granularity, const CUmemAllocationProp *,
                                       CUmemAllocationGranularity_flags) {
    *granularity = 2 << 20;
    return CUDA_SUCCESS;
}
CUresult cuMemAddressReserve(CUdeviceptr * out, size_t size, size_t, CUdeviceptr, unsigned long long) {
    *out = (CUdeviceptr) map_memory(size);
    return *out ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemAddressFree(CUdeviceptr base, size_t size) {
    munmap((void *) base, size);
    return CUDA_SUCCESS;
}
CUresult cuMemCreate(CUmemGenericAllocationHandle * out, size_t size, const CUmemAllocationProp *, unsigned long long) {
    const std::lock_guard<std::mutex> lock(mutex);
    return hold(size) ? (*out = counters[bytes_peak], CUDA_SUCCESS) : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemMap(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long) {
    return CUDA_SUCCESS;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle) {
    return CUDA_SUCCESS;
}
CUresult cuMemSetAccess(CUdeviceptr, size_t, const CUmemAccessDesc *, size_t) {
    return CUDA_SUCCESS;
}
CUresult cuMemUnmap(CUdeviceptr, size_t size) { // what was mapped there is released long before
    counters[bytes_held] -= size;
    return CUDA_SUCCESS;
}

// ---- streams, events, graphs -------------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithFlags(cudaStream_t * stream, unsigned) {
    return give(stream);
}
cudaError_t cudaStreamDestroy(cudaStream_t) {
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    return capturing ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t * event, unsigned) {
    return give(event);
}
cudaError_t cudaEventDestroy(cudaEvent_t) {
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) {
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus * status) {
    *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    capturing = true;
    ++counters[captures];
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t * graph) {
    capturing = false;
    return give(graph);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t * graph, cudaGraph_t, unsigned long long) {
    return give(graph);
}
cudaError_t cudaGraphExecUpdate(cudaGraphExec_t, cudaGraph_t, cudaGraphExecUpdateResultInfo *) {
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
    ++counters[graph_launches];
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t) {
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) {
    return cudaSuccess;
}

// ---- kernels -----------------------------------------------------------------------------------------------------

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes * attributes, const void *) {
    *attributes = {};
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 64;
    attributes->binaryVersion = 86;
    attributes->ptxVersion = 86;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) {
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int * n, const void *, int, size_t, unsigned) {
    *n = 2;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int * n, const void *, int, size_t) {
    *n = 2;
    return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *, const void *, void **) {
    ++counters[launches];
    return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void *, dim3, dim3, void **, size_t, cudaStream_t) {
    ++counters[launches];
    return cudaSuccess;
}
cudaError_t cudaLaunchCooperativeKernel(const void *, dim3, dim3, void **, size_t, cudaStream_t) {
    ++counters[launches];
    return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void * data) {
    function(data);
    return cudaSuccess;
}

unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void *) {
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 * grid, dim3 * block, size_t * shared, void * stream) {
    *grid = *block = dim3(1, 1, 1);
    *shared = 0;
    *static_cast<void **>(stream) = nullptr;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t * kernel, const void *) {
    return give(kernel);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void **, size_t, cudaStream_t) {
    ++counters[launches];
    return cudaSuccess;
}
void ** __cudaRegisterFatBinary(void *) {
    static void * handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
void __cudaRegisterFunction(void **, const char *, char *, const char *, int, uint3 *, uint3 *, dim3 *, dim3 *, int *) {
}
void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}

// ---- cuBLAS: of its many operands none is read, so that no declaration is needed -----------------------------------

int cublasCreate_v2(void ** handle) {
    give(handle);
    return 0;
}
int cublasDestroy_v2() {
    return 0;
}
int cublasSetStream_v2() {
    return 0;
}
int cublasSetMathMode() {
    return 0;
}
int cublasSetWorkspace_v2() {
    return 0;
}
int cublasLoggerConfigure() {
    return 0;
}
const char * cublasGetStatusString(int) {
    return "no error";
}

#define PRODUCT(name)                                                                                                  \
    int name() {                                                                                                       \
        ++counters[products];                                                                                          \
        return 0;                                                                                                      \
    }
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmBatchedEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemmBatched)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasStrsmBatched)

} // extern "C"
