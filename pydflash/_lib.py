"""The compiled core as Python sees it: cffi's `ffi` and `lib`, and statuses as exceptions.

The only module that imports `_pydflash`, which checks that header and library are of one build. Calls through `lib`
release the GIL.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydflash.errors import (
    ArgumentError,
    ContextFullError,
    DeviceError,
    DraftMismatchError,
    InternalError,
    ModelFileError,
    ModelFormatError,
    OutOfMemoryError,
    PydflashError,
    StateError,
    UnsupportedModelError,
    checked_path,
)

try:
    from _pydflash import MODELS as _MODELS
    from _pydflash import ffi as _ffi
    from _pydflash import lib as _lib
except ModuleNotFoundError as error:
    raise ImportError("pydflash's compiled part (_pydflash) is not installed: run 'pip install .' first") from error

ffi: Any = _ffi
lib: Any = _lib
MODELS: Path = _MODELS

_ERRORS: dict[int, type[PydflashError]] = {
    lib.PF_ERR_ARGUMENT: ArgumentError,
    lib.PF_ERR_FILE: ModelFileError,
    lib.PF_ERR_FORMAT: ModelFormatError,
    lib.PF_ERR_UNSUPPORTED: UnsupportedModelError,
    lib.PF_ERR_MISMATCH: DraftMismatchError,
    lib.PF_ERR_MEMORY: OutOfMemoryError,
    lib.PF_ERR_CONTEXT: ContextFullError,
    lib.PF_ERR_STATE: StateError,
    lib.PF_ERR_DEVICE: DeviceError,
}


def check(status: int, *, path: str | os.PathLike[str] | None = None) -> None:
    """Raises what a PF_* status stands for, with the core's own sentence."""
    if status != lib.PF_OK:
        message = ffi.string(lib.pf_last_error()).decode("utf-8", "replace")
        raise _ERRORS.get(status, InternalError)(message, path=path)


def c_path(path: str | os.PathLike[str]) -> bytes:
    """A path as the core takes it."""
    checked_path(path)
    raw = os.fsencode(path)
    if b"\0" in raw:
        raise ArgumentError(f"a path cannot contain a NUL byte: {os.fspath(path)!r}")
    return raw
