// The wall between C++ and C: every C entry runs its body inside guard(), which catches everything, keeps the sentence
// for pf_last_error() and returns the status.
#pragma once

#include <new>
#include <string>
#include <utility>

#include "error.h"

namespace pf {

// Keeps `message` as the calling thread's last error and returns `code`. Never throws, even when out of memory.
int set_last_error(int code, const char * message) noexcept;

template <class Body>
int guard(Body && body) noexcept {
    try {
        std::forward<Body>(body)();
        return PF_OK;
    } catch (const Error & e) {
        return set_last_error(e.code, e.what());
    } catch (const std::bad_alloc &) {
        return set_last_error(PF_ERR_MEMORY, "out of memory");
    } catch (const std::exception & e) {
        return set_last_error(PF_ERR_INTERNAL, e.what());
    } catch (...) {
        return set_last_error(PF_ERR_INTERNAL, "unknown exception");
    }
}

} // namespace pf
