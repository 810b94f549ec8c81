"""Where the pair of models lies that ships with pydflash."""

from __future__ import annotations

from pathlib import Path

from pydflash._lib import MODELS
from pydflash.errors import ModelFileError


def target_path() -> Path:
    """The tiny trained target, a GGUF."""
    return _present(MODELS / "tiny-target-f16.gguf")


def draft_path() -> Path:
    """The DFlash drafter trained for it, a folder as z-lab lays it out."""
    return _present(MODELS / "tiny-draft")


def _present(path: Path) -> Path:
    if not path.exists():
        raise ModelFileError(f"the model that ships with pydflash is not at {path}: reinstall pydflash", path=path)
    return path
