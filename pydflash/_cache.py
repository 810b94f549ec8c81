"""Converted drafters, kept in the user's cache folder under a hash of what they were made from."""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path

from pydflash import convert
from pydflash.errors import ModelFileError


def cached_draft(folder: Path) -> Path:
    """The GGUF of a z-lab drafter folder: converted at first use, found again by its content afterwards."""
    parts = [folder / "config.json", *sorted(folder.glob("*.safetensors*"))]
    cache = cache_folder() / "drafts"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelFileError(
            f"cannot keep the converted drafter in {cache} ({error.strerror}): set XDG_CACHE_HOME to a folder that can "
            f"be written, or convert it with 'python -m pydflash.convert {folder} DRAFT.gguf'",
            path=folder,
        ) from None
    try:
        key = _content_key(parts, cache)
    except OSError as error:
        raise ModelFileError(
            f"{folder} is not a drafter's folder: {error.strerror}: {error.filename}", path=folder
        ) from None
    converted = cache / f"{key}-{convert.VERSION}.gguf"
    if not converted.exists():
        convert.convert(folder, converted)
    return converted


def cache_folder() -> Path:
    """Where pydflash keeps what it can make again: $XDG_CACHE_HOME/pydflash, or ~/.cache/pydflash."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "pydflash"


def _content_key(parts: list[Path], cache: Path) -> str:
    """64 hex digits that stand for what the files hold.

    Hashing gigabytes takes seconds, so the answer is noted down under the files' names, sizes and times.
    """
    stamps = [(str(part.resolve()), part.stat()) for part in parts]
    stamp = repr([(name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stamps])
    note = cache / f"{hashlib.sha256(stamp.encode()).hexdigest()}.key"
    key = note.read_text(errors="replace") if note.exists() else ""
    if re.fullmatch("[0-9a-f]{64}", key):
        return key
    total = hashlib.sha256()
    for part in parts:
        one = hashlib.sha256()
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                one.update(block)
        total.update(f"{part.name}\0".encode() + one.digest())
    key = total.hexdigest()
    with suppress(OSError):  # it only saves time
        note.write_text(key)
    return key
