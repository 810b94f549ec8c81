// A CUDA toolkit for g++: what common.cuh and the tree kernels use of the language and of the runtime, on host threads'
// terms. Owns the spelling only; what a block, a barrier and a shuffle do is in emulator.h. Force-included, so that
// __global__ and threadIdx are known from the first line of a .cu file on.
#pragma once

#include "../emulator.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#define CUDART_VERSION 11070 // from 11080 on common.cuh wants fp8 types and programmatic launches
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 860
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

#define threadIdx (emulator::self().index)
#define blockIdx (emulator::self().block)
#define blockDim (emulator::self().block_size)
#define gridDim (emulator::self().grid_size)
#define __syncthreads() emulator::barrier(__FILE__, __LINE__)
#define __syncwarp(...) emulator::sync_warp(__FILE__, __LINE__)
#define __shfl_sync(...) emulator::shuffle(emulator::from_lane, __FILE__, __LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) emulator::shuffle(emulator::from_xor, __FILE__, __LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) emulator::shuffle(emulator::from_up, __FILE__, __LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) emulator::shuffle(emulator::from_down, __FILE__, __LINE__, __VA_ARGS__)
#define __ballot_sync(mask, x) emulator::ballot(__FILE__, __LINE__, mask, (x) != 0)
#define __any_sync(mask, x) (__ballot_sync(mask, x) != 0)
#define __all_sync(mask, x) (__ballot_sync(mask, (x) == 0) == 0)
#define __reduce_add_sync(mask, x) emulator::reduce_add(__FILE__, __LINE__, mask, x)
#define __trap() emulator::fail("__trap()")
#define __builtin_assume(x)

struct int2 { int x, y; };
struct int4 { int x, y, z, w; };
struct uint2 { unsigned x, y; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <typename T>
T min(T a, T b) { return b < a ? b : a; }
template <typename T>
T max(T a, T b) { return a < b ? b : a; }

inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned) ((uint64_t) a * b >> 32); }
inline int __dp4a(int, int, int) { emulator::fail("__dp4a is not emulated"); }
inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
inline int __float_as_int(float x) { return (int) __float_as_uint(x); }
inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
inline float __int_as_float(int bits) { return __uint_as_float((unsigned) bits); }

// one thread runs at a time and is never interrupted
template <typename T>
T atomicAdd(T * at, T x) { const T old = *at; *at = old + x; return old; }

// -- the runtime: one device, on which everything happens at once ------------------------------------------------------

enum cudaError_t { cudaSuccess };
typedef void * cudaStream_t;
typedef void * cudaEvent_t;
typedef void * cudaGraph_t;
typedef void * cudaGraphExec_t;
typedef void * cudaGraphNode_t;
enum { cudaStreamNonBlocking, cudaEventDisableTiming, cudaFuncAttributeMaxDynamicSharedMemorySize };

inline const char * cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *, int) { return cudaSuccess; }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *, int) { return cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaMalloc(void **, size_t) { emulator::fail("cudaMalloc is not emulated: use the pool"); }
template <typename T>
cudaError_t cudaMalloc(T ** p, size_t n) { return cudaMalloc((void **) p, n); }
