// bfloat16 as common.cuh names it. No kernel of ours computes in it.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
    uint16_t bits;
};
typedef __nv_bfloat16 nv_bfloat16;
struct __nv_bfloat162 {
    nv_bfloat16 x, y;
};
typedef __nv_bfloat162 nv_bfloat162;
