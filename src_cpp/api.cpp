// The C interface: handles, status codes, no exceptions across.
#include "pydflash.h"

int pf_abi_version(void) {
    return PF_ABI_VERSION;
}
