"""The core's handles: models that sessions share, and one session on them; freed in the right order."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

from pydflash._lib import c_path, check, ffi, lib
from pydflash.errors import ModelFileError, checked_path

PathLike = str | os.PathLike[str]


class Models:
    """Target and drafter on one device ("cpu" or "cuda"), freed when the last session that uses them lets go."""

    def __init__(self, target: Path, draft: Path | None, device: str) -> None:
        self.target, self.draft, self.device = target, draft, device
        self.identities = {"target": identity(target), "draft": None if draft is None else identity(draft)}
        self.fingerprints: dict[str, str] = {}  # by role, once somebody has asked (`store`)
        owned: list[tuple[Any, Any]] = []
        # At exit a daemon thread may still be inside; the process frees it all.
        weakref.finalize(self, _free, owned).atexit = False
        self.model = _own(
            owned,
            "pf_model",
            lib.pf_model_free,
            lambda out: lib.pf_model_open(c_path(target), device.encode(), out),
            target,
        )
        info = ffi.new("pf_model_info *", {"size": ffi.sizeof("pf_model_info")})
        check(lib.pf_model_get_info(self.model, info))
        self.n_vocab, self.n_embd, self.n_layer = int(info.n_vocab), int(info.n_embd), int(info.n_layer)
        self.block_size = 0
        self.drafter = ffi.NULL
        if draft is not None:
            self.drafter = _own(
                owned,
                "pf_draft",
                lib.pf_draft_free,
                lambda out: lib.pf_draft_open(c_path(draft), self.model, out),
                draft,
            )
            draft_info = ffi.new("pf_draft_info *", {"size": ffi.sizeof("pf_draft_info")})
            check(lib.pf_draft_get_info(self.drafter, draft_info))
            self.block_size = int(draft_info.block_size)


class Handles:
    """One pf_session on models that others may share; `free` ends it, and lets go of them."""

    def __init__(self, models: Models, params: Any) -> None:
        self.models: Models | None = models
        self._owned: list[tuple[Any, Any]] = []
        self.session = _own(
            self._owned,
            "pf_session",
            lib.pf_session_free,
            lambda out: lib.pf_session_open(models.model, models.drafter, params, out),
            models.target,
        )

    def free(self) -> None:
        """Frees what is open; freeing twice is fine."""
        _free(self._owned)
        self.models = None


def identity(path: Path) -> tuple[int, int, int, int] | None:
    """Which file a path leads to, and when it was changed last; None when there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _own(owned: list[tuple[Any, Any]], kind: str, free: Any, open_it: Any, path: Path) -> Any:
    out = ffi.new(f"{kind} **")
    check(open_it(out), path=path)
    owned.append((free, out[0]))
    return out[0]


def _free(owned: list[tuple[Any, Any]]) -> None:
    while owned:
        free, handle = owned.pop()
        free(handle)


def target_file(target: PathLike) -> Path:
    """The target's file."""
    path = _existing(target, "target")
    if path.is_dir():
        raise ModelFileError(f"the target must be a GGUF file, but {path} is a folder", path=path)
    return path


def _existing(path: PathLike, role: str) -> Path:
    found = checked_path(path)
    c_path(found)  # refuses what no path can be
    if not found.exists():
        raise ModelFileError(f"the {role} {found} does not exist", path=found)
    return found


def draft_file(draft: PathLike) -> Path:
    """The drafter's GGUF; a folder is converted first."""
    path = _existing(draft, "draft")
    if path.is_dir():
        from pydflash._cache import cached_draft

        return cached_draft(path)
    return path
