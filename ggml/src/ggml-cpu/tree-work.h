// How the tree ops share work: ranges for threads, and pieces of the work memory that ggml plans for an op.
#pragma once

#include "ggml-cpu-impl.h"

#include <cstdint>

struct Range {
    int64_t begin, end;
};

static inline Range thread_share(const ggml_compute_params * params, int64_t n) {
    return {n * params->ith / params->nth, n * (params->ith + 1) / params->nth};
}

static inline int64_t pad(int64_t n, int64_t to) {
    return (n + to - 1) / to * to;
}

// Hands out 64-byte aligned pieces of work memory. With base == nullptr it only counts.
struct Scratch {
    char * base;
    size_t used = 0;

    template <typename T>
    T * take(int64_t n) {
        T * piece = base ? (T *) (base + used) : nullptr;
        used += pad(n * sizeof(T), 64);
        return piece;
    }
};

// One thread's own piece of so many bytes.
static inline Scratch scratch_of(const ggml_compute_params * params, size_t bytes_per_thread) {
    char * aligned = (char *) pad((int64_t) (uintptr_t) params->wdata, 64);
    GGML_ASSERT(aligned + bytes_per_thread * params->nth <= (char *) params->wdata + params->wsize);
    return {aligned + bytes_per_thread * params->ith};
}

// One piece that all threads see.
static inline Scratch shared_scratch(const ggml_compute_params * params, size_t bytes) {
    char * aligned = (char *) pad((int64_t) (uintptr_t) params->wdata, 64);
    GGML_ASSERT(aligned + bytes <= (char *) params->wdata + params->wsize);
    return {aligned};
}

static inline float * row_of(const ggml_tensor * t, int64_t i1, int64_t i2 = 0) {
    return (float *) ((char *) t->data + i1 * t->nb[1] + i2 * t->nb[2]);
}

// A product so small that it is shared out beforehand and every thread prepares all columns for itself: a barrier would
// cost more.
static inline bool is_small_product(const ggml_tensor * dst) {
    return dst->ne[1] <= 64 && ggml_nelements(dst) * dst->src[0]->ne[0] <= 1 << 22;
}
