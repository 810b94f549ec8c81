"""What sessions learn about speed, kept in the user's cache folder for later ones: it changes how fast tokens come, and
never which."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydflash._lib import check, ffi, lib
from pydflash.device import device_info

if TYPE_CHECKING:
    from pydflash._handles import Models


class Experience:
    """The entry of one machine, pair of models, and settings. Nothing here raises: without an entry a session measures,
    and what cannot be kept is learned again."""

    def __init__(self, models: Models, settings: tuple[object, ...]) -> None:
        device = device_info(models.device)
        key = repr((lib.PF_ABI_VERSION, device.name, os.cpu_count(), _binary(), models.identities, settings))
        self._name = hashlib.sha256(key.encode()).hexdigest()
        self._last: bytes | None = None  # as the file has it

    def _path(self) -> Path:
        from pydflash._cache import cache_folder

        return cache_folder() / "speed" / self._name

    def load(self, session: Any) -> None:
        """Gives the session what was kept, if anything was."""
        with contextlib.suppress(OSError):
            kept = self._path().read_bytes()
            lib.pf_session_set_experience(session, kept, len(kept))  # refuses what is damaged
        self._last = _known(session)

    def save(self, session: Any) -> None:
        """Keeps what the session knows by now, if that is anything new."""
        known = _known(session)
        if known == self._last:
            return
        path = self._path()
        scratch = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_bytes(known)
            scratch.replace(path)
            self._last = known
        except OSError:
            with contextlib.suppress(OSError):
                scratch.unlink()


def _known(session: Any) -> bytes:
    n = lib.pf_session_experience_bytes()
    buffer = ffi.new("char[]", n)
    check(lib.pf_session_get_experience(session, buffer, n))
    return bytes(ffi.buffer(buffer))


def _binary() -> object:
    """The core that was measured with."""
    import _pydflash

    folder = Path(_pydflash.__file__).parent
    return sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.glob("*.so"))
