// half and half2 as common.cuh's helpers name them. No kernel of ours computes in them.
#pragma once

#include "cuda_runtime.h"

struct half {
    uint16_t bits;
    operator float() const { emulator::fail("half arithmetic is not emulated"); }
};
struct half2 {
    half x, y;
};
typedef half __half;
typedef half2 __half2;

inline half __float2half(float) { emulator::fail("half arithmetic is not emulated"); }
inline float __half2float(half x) { return x; }
inline float __low2float(half2 a) { return a.x; }
inline float __high2float(half2 a) { return a.y; }
inline half __low2half(half2 a) { return a.x; }
inline half __high2half(half2 a) { return a.y; }
inline float2 __half22float2(half2 a) { return {a.x, a.y}; }
inline half2 make_half2(half x, half y) { return {x, y}; }
inline half2 make_half2(float x, float y) { return {__float2half(x), __float2half(y)}; }
inline half __hmax(half a, half b) { return __float2half(fmaxf(a, b)); }
inline half2 __hmax2(half2 a, half2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
inline half2 __hadd2(half2 a, half2 b) { return make_half2((float) a.x + b.x, (float) a.y + b.y); }
inline half2 operator*(half2 a, half2 b) { return make_half2((float) a.x * b.x, (float) a.y * b.y); }
inline half2 & operator+=(half2 & a, half2 b) { return a = __hadd2(a, b); }
