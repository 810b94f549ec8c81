// The one exception type of libpydflash. It never crosses the C interface: api.cpp turns it into a status
// and a sentence (pf_last_error).
#pragma once

#include <stdexcept>
#include <string>

#include "pydflash.h"

namespace pf {

struct Error : std::runtime_error {
    Error(int code, const std::string & message) : std::runtime_error(message), code(code) {}
    int code; // PF_ERR_*
};

// Throws PF_ERR_ARGUMENT unless `ok`.
inline void require(bool ok, const char * message) {
    if (!ok) {
        throw Error(PF_ERR_ARGUMENT, message);
    }
}

} // namespace pf
