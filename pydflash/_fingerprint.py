"""What tells one model file from another without reading all of it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pydflash._gguf import Gguf
from pydflash.errors import ModelFileError

N_SAMPLES = 1024
SAMPLE = 64 << 10  # bytes

_known: dict[tuple[str, int, int, int], str] = {}


def fingerprint(path: str | os.PathLike[str]) -> str:
    """64 hex digits for a GGUF file: SHA-256 over its size, all in front of the tensors' data (metadata, names, shapes
    and types), and 1024 evenly spaced samples of 64 KiB of that data, the first at its beginning and the last at its
    end; up to 64 MiB of it are read whole.

    It cannot see a change that lies between two samples: in a file of 16 GB that is one within a stretch of 16 MB, less
    than most of its matrices. Training, merging, quantising or converting a model anew changes every sample; editing
    single small tensors, such as one norm, may change none.

    Worked out once for each path, size, time of change and inode in a process. ModelFileError when it cannot be read,
    ModelFormatError when it is no GGUF.
    """
    name = os.path.realpath(path)
    try:
        status = os.stat(name)
        key = (name, status.st_size, status.st_mtime_ns, status.st_ino)
        if key not in _known:
            _known[key] = _hash(Path(name), status.st_size)
        return _known[key]
    except OSError as error:
        raise ModelFileError(f"{name} cannot be read: {error.strerror}", path=name) from error


def _hash(path: Path, size: int) -> str:
    with Gguf(path) as gguf:
        start = gguf.data_start() or size
    total = hashlib.sha256(size.to_bytes(8, "little"))
    with path.open("rb", buffering=0) as file:
        for offset, end in [(0, start), *_samples(start, size)]:
            while offset < end:
                block = os.pread(file.fileno(), min(end - offset, 1 << 20), offset)
                if not block:
                    raise ModelFileError(f"{path} was cut while it was being read", path=path)
                total.update(block)
                offset += len(block)
    return total.hexdigest()


def _samples(start: int, end: int) -> list[tuple[int, int]]:
    if end - start <= N_SAMPLES * SAMPLE:
        return [(start, end)]
    firsts = (start + i * (end - SAMPLE - start) // (N_SAMPLES - 1) for i in range(N_SAMPLES))
    return [(first, first + SAMPLE) for first in firsts]
