"""The core's handles of one session: opened together, freed in the right order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydflash._lib import c_path, check, ffi, lib
from pydflash.errors import ModelFileError

PathLike = str | os.PathLike[str]


class Handles:
    """Target and drafter on one device ("cpu" or "cuda"), and a session on them once it is opened; freed in the
    opposite order."""

    def __init__(self, target: Path, draft: Path | None, device: str) -> None:
        self._owned: list[tuple[Any, Any]] = []
        self._target = target
        try:
            self.model = self._own(
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
                self.drafter = self._own(
                    "pf_draft", lib.pf_draft_free, lambda out: lib.pf_draft_open(c_path(draft), self.model, out), draft
                )
                draft_info = ffi.new("pf_draft_info *", {"size": ffi.sizeof("pf_draft_info")})
                check(lib.pf_draft_get_info(self.drafter, draft_info))
                self.block_size = int(draft_info.block_size)
        except BaseException:
            self.free()
            raise

    def open_session(self, params: Any) -> None:
        """Opens `session`; what was open is freed when that fails."""
        try:
            self.session = self._own(
                "pf_session",
                lib.pf_session_free,
                lambda out: lib.pf_session_open(self.model, self.drafter, params, out),
                self._target,
            )
        except BaseException:
            self.free()
            raise

    def _own(self, kind: str, free: Any, open_it: Any, path: Path) -> Any:
        out = ffi.new(f"{kind} **")
        check(open_it(out), path=path)
        self._owned.append((free, out[0]))
        return out[0]

    def free(self) -> None:
        """Frees what is open; freeing twice is fine."""
        while self._owned:
            free, handle = self._owned.pop()
            free(handle)


def target_file(target: PathLike) -> Path:
    """The target's file."""
    path = _existing(target, "target")
    if path.is_dir():
        raise ModelFileError(f"the target must be a GGUF file, but {path} is a folder", path=path)
    return path


def _existing(path: PathLike, role: str) -> Path:
    found = Path(path)
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
