// Rows of a KV cache as floats.
//
// Attention unpacks every key and value it looks at, and with few queries that is a large part of its time: the types
// that caches come in have their own words on AVX-512 and AVX2; all else goes through ggml's.
#pragma once

#define GGML_COMMON_DECL_CPP
#include "float-lanes.h"
#include "ggml-common.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "simd-mappings.h"

#include <cstdint>

#if defined(PF_FLOAT_LANES)

static inline void unpack_f16(const ggml_fp16_t * from, float * to, int64_t n) { // a call costs a fifth more
    for (int64_t i = 0; i < n; i += PF_FLOAT_LANES) {
        tree_vec_store(to + i, lanes_of_f16(from + i));
    }
}

static inline void unpack_q8_0(const block_q8_0 * block, float * to, int64_t n) {
    for (int64_t i = 0; i < n; i += QK8_0, ++block) {
        const float d = GGML_CPU_FP16_TO_FP32(block->d);
        const __m128i * codes = (const __m128i *) block->qs;
        store_codes(to + i, _mm_loadu_si128(codes), d);
        store_codes(to + i + 16, _mm_loadu_si128(codes + 1), d);
    }
}

static inline void unpack_q4_0(const block_q4_0 * block, float * to, int64_t n) { // low nibbles first, each less 8
    const __m128i low = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    for (int64_t i = 0; i < n; i += QK4_0, ++block) {
        const float d = GGML_CPU_FP16_TO_FP32(block->d);
        const __m128i codes = _mm_loadu_si128((const __m128i *) block->qs);
        const __m128i high = _mm_and_si128(_mm_srli_epi16(codes, 4), low);
        store_codes(to + i, _mm_sub_epi8(_mm_and_si128(codes, low), eight), d);
        store_codes(to + i + 16, _mm_sub_epi8(high, eight), d);
    }
}

#endif

// A row of n values. What ggml does, this backend's ggml does, which knows the processor, where it has a word for it.
static inline void unpack_cache_row(ggml_type type, const void * from, float * to, int64_t n) {
    switch (type) {
#if defined(PF_FLOAT_LANES)
    case GGML_TYPE_F16:
        return unpack_f16((const ggml_fp16_t *) from, to, n);
    case GGML_TYPE_Q8_0:
        return unpack_q8_0((const block_q8_0 *) from, to, n);
    case GGML_TYPE_Q4_0:
        return unpack_q4_0((const block_q4_0 *) from, to, n);
#else
    case GGML_TYPE_F16:
        return ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) from, to, n);
#endif
    case GGML_TYPE_BF16:
        return ggml_cpu_bf16_to_fp32((const ggml_bf16_t *) from, to, n);
    default:
        ggml_get_type_traits(type)->to_float(from, to, n);
    }
}

static inline bool unpacks_cache(ggml_type type) {
    return type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float;
}

// n rows from `first` on as floats, in `to` [n][ne[0]] unless they are floats already, and the stride between them.
// `ahead`: rows further on, which will be asked for next.
static inline const float * rows_of_cache(const ggml_tensor * t, int64_t head, int64_t first, int64_t n, int64_t ahead,
                                          float * to, int64_t * stride) {
    const char * data = (const char *) t->data + head * t->nb[2] + first * t->nb[1];
    if (t->type == GGML_TYPE_F32) {
        *stride = (int64_t) (t->nb[1] / sizeof(float));
        return (const float *) data;
    }
    *stride = t->ne[0];
    const size_t row_size = ggml_row_size(t->type, t->ne[0]);
    float * row = to;
    for (int64_t i = 0; i < n; ++i, data += t->nb[1], row += t->ne[0]) {
        // A head's rows lie apart, where no processor looks ahead by itself.
        for (size_t line = 0; line < row_size; line += 64) {
            __builtin_prefetch(data + ahead * t->nb[1] + line, 0, 2);
        }
        unpack_cache_row(t->type, data, row, t->ne[0]);
    }
    return to;
}
