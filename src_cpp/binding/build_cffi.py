"""Write the C source of `_pydflash._core` from pydflash.h.

Owns the step from the C header to cffi declarations. cffi's parser knows no preprocessor, so the header keeps to
plain declarations and integer `#define`s, and this removes the rest. The result includes the real header, so the C
compiler checks every declaration against it: what was misread here does not compile.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import cffi

# Functions of a pf_constraint, defined in pydflash/constraint.py.
PYTHON_FUNCTIONS = """
extern "Python" int pf_python_mask(void * user, const int32_t * path, int32_t n, uint32_t * bits);
extern "Python" int pf_python_allowed(void * user, const int32_t * path, int32_t n);
extern "Python" int pf_python_forced(void * user, int32_t * out, int32_t most);
"""


def cdef_from_header(header: str) -> str:
    """The declarations of a C header, as cffi reads them."""
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    text = re.sub(r"^#ifdef __cplusplus$.*?^#endif$", "", text, flags=re.DOTALL | re.MULTILINE)
    # Of the directives only integer constants stay; array lengths need their values.
    text = re.sub(r"^#(?!define PF_\w+ +-?\w+ *$).*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\bPF_API\b", "", text)


def main(header: Path, output: Path) -> None:
    builder = cffi.FFI()
    builder.cdef(cdef_from_header(header.read_text()))
    builder.cdef(PYTHON_FUNCTIONS)
    builder.set_source("_pydflash._core", f'#include "{header.name}"')
    builder.emit_c_code(str(output))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
