"""The compiled half of pydflash: `lib` and `ffi` over pydflash.h, and the models that ship with it.

Owns the check that header and library are of one build. Nothing here is public: `pydflash` is the package to import.
"""

from pathlib import Path

from _pydflash._core import ffi, lib

__all__ = ["MODELS", "ffi", "lib"]

MODELS = Path(__file__).resolve().parent / "models"

if lib.pf_abi_version() != lib.PF_ABI_VERSION:
    raise ImportError(
        f"libpydflash speaks ABI version {lib.pf_abi_version()}, but this pydflash was built for version "
        f"{lib.PF_ABI_VERSION}: two builds are mixed in {Path(__file__).parent}. Reinstall pydflash."
    )
