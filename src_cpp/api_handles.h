// The C interface's handles, and the structs that begin with their own size: shared by the api_*.cpp files alone.
#pragma once

#include <cstring>
#include <memory>

#include "error.h"
#include "session.h"

struct pf_model {
    std::shared_ptr<const pf::Target> target;
};

struct pf_draft {
    std::shared_ptr<const pf::Drafter> drafter;
};

struct pf_session {
    std::shared_ptr<const pf::Target> target;
    std::shared_ptr<const pf::Drafter> drafter;
    pf::Session session;
};

namespace pf {

// The struct the caller compiled against may be older and shorter than ours: fields it lacks keep their defaults.
template <class T>
T read_params(const T * given, void (*set_default)(T *)) {
    T params;
    set_default(&params);
    if (given) {
        pf::require(given->size >= sizeof(uint32_t) && given->size <= sizeof(T),
                    "the size field of an options struct is wrong; fill it with its *_default() function first");
        std::memcpy(&params, given, given->size);
        params.size = sizeof(T);
    }
    return params;
}

template <class T>
void check_result(const T * out) {
    pf::require(out && out->size >= sizeof(uint32_t) && out->size <= sizeof(T),
                "a result struct is null or its size field is wrong; set it to sizeof");
}

template <class T>
void write_result(const T & result, T * out) {
    const uint32_t size = out->size;
    std::memcpy(out, &result, size);
    out->size = size;
}

} // namespace pf
