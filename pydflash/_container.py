"""A file of named sections that is either whole or refused.

    0  magic "PYDFLASH", then little-endian u32 version, u32 size of the header block (a multiple of 4096)
   16  SHA-256 of the header block without these 32 bytes
   48  JSON {"meta": {...}, "sections": [[name, size, SHA-256 in hex], ...]}, padded with spaces to the block's size
    .  the sections in that order, each padded with zeros to a multiple of 4096, over which its SHA-256 goes
  end  nothing behind the last one

So each byte of the file is under exactly one checksum, and where a section lies follows from the sizes before it.
SHA-256 because it is the fastest sound hash of the standard library where the processor has instructions for it (here
1.2 GB/s a core; BLAKE2b 0.6, CRC-32 2.2). Files are read, not mapped: one that is cut or fails while it is mapped kills
the process, and a read from the page cache is faster than the checksum anyway.

Writing replaces: a temporary file in the same folder, fsync, rename, fsync of the folder. Whoever is killed on the way
leaves the old file and a temporary one, which the next writer in that folder removes: a living writer holds a lock on
its own. What sections mean is for others to know.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from pydflash.errors import InternalError, SessionFileError

MAGIC = b"PYDFLASH"
VERSION = 1
ALIGN = 4096
BLOCK = 4 << 20  # bytes read and hashed at once
_PREFIX = struct.Struct("<8sII32s")
_SUMMED = 16  # bytes of the prefix under the header's checksum
_MAX_HEADER = 16 << 20
_TEMPORARY = (".pydflash-", ".tmp")

Buffer: TypeAlias = "bytes | bytearray | memoryview"


@dataclass(frozen=True)
class NewSection:
    """A section to write: `size` bytes that come as `blocks`, made while they are written; a block may be reused for
    the next one."""

    name: str
    size: int
    blocks: Iterable[Buffer]


@dataclass(frozen=True)
class Section:
    """A section of an open file: `size` bytes from `offset`."""

    name: str
    offset: int
    size: int
    digest: str


def write(path: str | os.PathLike[str], meta: Mapping[str, Any], sections: Sequence[NewSection]) -> int:
    """Writes a file, or replaces the one that is there, whole or not at all; returns its size in bytes.

    meta: what JSON can say. Memory: one block at a time.
    SessionFileError when it cannot be written (no such folder, no space, no right); what was there is untouched then.
    """
    final = Path(os.path.realpath(path))  # a link stays, its file is replaced
    if final.is_dir():
        raise SessionFileError(f"cannot save to {final}: that is a folder", path=final, what="a folder")
    if final.exists() and not final.is_file():
        raise SessionFileError(f"cannot save to {final}: that is no ordinary file", path=final, what="no ordinary file")
    digests = ["0" * 64 for _ in sections]
    header_size = len(_header(meta, sections, digests))
    total = header_size + sum(_padded(section.size) for section in sections)
    try:
        remove_stale(final.parent)
        with _temporary(final.parent) as (fd, temporary):
            os.lseek(fd, header_size, os.SEEK_SET)
            for i, section in enumerate(sections):
                digests[i] = _write_section(fd, section)
            os.lseek(fd, 0, os.SEEK_SET)
            _write_all(fd, _header(meta, sections, digests))
            os.fsync(fd)
            os.rename(temporary, final)
    except OSError as error:
        raise SessionFileError(
            f"cannot save to {final}: {error.strerror}{_space(final.parent, total, error)}; what was there before is "
            "untouched",
            path=final,
            what=str(error.strerror),
        ) from error
    with suppress(OSError):  # some filesystems cannot; there a rename is as lasting as it gets
        folder = os.open(final.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return total


def remove_stale(folder: Path) -> None:
    """Removes the temporary files of writers that are dead: those nobody holds the lock of."""
    for name in os.listdir(folder):
        if name.startswith(_TEMPORARY[0]) and name.endswith(_TEMPORARY[1]):
            with suppress(OSError):  # locked by a living writer, gone by now, or somebody else's
                fd = os.open(folder / name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(folder / name)
                finally:
                    os.close(fd)


class Container:
    """An open file, its header checked; a context manager.

    meta: what was written as such. sections: by name, in the file's order.
    Everything that is wrong with the file is a SessionFileError, here or when the section concerned is read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its writer
            self._read_header()
        except OSError as error:
            self.close()
            raise self._wrong(f"cannot be read: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closing twice is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def section(self, name: str) -> Section:
        """A section by its name."""
        if name not in self.sections:
            raise self._wrong(f"has no section {name!r}")
        return self.sections[name]

    def read(self, name: str, *, at_most: int) -> bytes:
        """All of a section, checked. at_most: bytes that are believed; a larger one is refused unread."""
        section = self.section(name)
        if section.size > at_most:
            raise self._wrong(f"has {section.size} bytes, at most {at_most} make sense", f"section {name!r}")
        data = bytearray(_padded(section.size))
        self.read_into(section, 0, data)
        self._check(section, hashlib.sha256(data).hexdigest())
        return bytes(memoryview(data)[: section.size])

    def read_into(self, section: Section, offset: int, out: bytearray | memoryview) -> None:
        """Fills `out` from a section's byte `offset` on, unchecked: `verify` comes first."""
        view = memoryview(out).cast("B")
        while view.nbytes:
            try:
                n = os.preadv(self._fd, [view], section.offset + offset)
            except OSError as error:
                raise self._wrong(f"cannot be read: {error.strerror}", f"section {section.name!r}") from error
            if n == 0:
                raise self._wrong("ends too early: it was cut while it was being read", f"section {section.name!r}")
            view, offset = view[n:], offset + n

    def verify(self) -> None:
        """Checks all sections, on up to four threads."""
        n_threads = min(4, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(n_threads) as pool:
            digests = pool.map(self._digest, self.sections.values())
            for section, digest in zip(self.sections.values(), digests, strict=True):
                self._check(section, digest)

    def _digest(self, section: Section) -> str:
        total, buffer = hashlib.sha256(), memoryview(bytearray(min(BLOCK, _padded(section.size))))
        for start in range(0, _padded(section.size), BLOCK):
            piece = buffer[: min(BLOCK, _padded(section.size) - start)]
            self.read_into(section, start, piece)
            total.update(piece)
        return total.hexdigest()

    def _check(self, section: Section, digest: str) -> None:
        if digest != section.digest:
            raise self._wrong(
                "does not match its checksum: the file is damaged", f"section {section.name!r} at byte {section.offset}"
            )

    def _read_header(self) -> None:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise self._wrong("is not a file")
        prefix = os.pread(self._fd, _PREFIX.size, 0)
        if len(prefix) < _PREFIX.size or not prefix.startswith(MAGIC):
            raise self._wrong("is not a file that pydflash saved: give one that Session.save wrote")
        _, version, size, digest = _PREFIX.unpack(prefix)
        if version != VERSION:
            raise self._wrong(f"is of format {version}; this pydflash reads format {VERSION}", "byte 8")
        if size % ALIGN or not ALIGN <= size <= min(_MAX_HEADER, status.st_size):
            raise self._wrong(f"states a header of {size} bytes in a file of {status.st_size}", "byte 12")
        block = os.pread(self._fd, size, 0)
        if _header_digest(block) != digest:
            raise self._wrong("does not match its checksum: the file is damaged", "the header")
        try:
            header = json.loads(block[_PREFIX.size :])
            self.meta: dict[str, Any] = dict(header["meta"])
            self.sections: dict[str, Section] = {}
            end = size
            for name, n_bytes, section_digest in header["sections"]:
                if type(n_bytes) is not int or n_bytes < 0 or name in self.sections:
                    raise ValueError(f"section {name!r} of {n_bytes!r} bytes")
                self.sections[name] = Section(name, end, n_bytes, section_digest)
                end += _padded(n_bytes)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise self._wrong(f"cannot be understood: {error}", "the header") from error
        if end != status.st_size:
            raise self._wrong(f"has {status.st_size} bytes, but its sections end at {end}: it was cut or added to")

    def _wrong(self, what: str, where: str = "") -> SessionFileError:
        sentence = f"{self.path}: {where} {what}" if where else f"{self.path} {what}"
        return SessionFileError(sentence, path=self.path, what=what, where=where)


def _padded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _header(meta: Mapping[str, Any], sections: Sequence[NewSection], digests: Sequence[str]) -> bytes:
    """The header block; its size does not depend on what the checksums are."""
    rows = [[section.name, section.size, digest] for section, digest in zip(sections, digests, strict=True)]
    text = json.dumps({"meta": meta, "sections": rows}).encode()
    size = _padded(_PREFIX.size + len(text))
    if size > _MAX_HEADER:
        raise InternalError(f"a header of {size} bytes is more than the {_MAX_HEADER} that are read again")
    text = text.ljust(size - _PREFIX.size)
    unsigned = _PREFIX.pack(MAGIC, VERSION, size, bytes(32)) + text
    return _PREFIX.pack(MAGIC, VERSION, size, _header_digest(unsigned)) + text


def _header_digest(block: bytes) -> bytes:
    return hashlib.sha256(block[:_SUMMED] + block[_PREFIX.size :]).digest()


def _write_section(fd: int, section: NewSection) -> str:
    total, left = hashlib.sha256(), section.size
    for block in section.blocks:
        view = memoryview(block).cast("B")
        left -= view.nbytes
        total.update(view)
        _write_all(fd, view)
    if left:
        raise InternalError(f"section {section.name!r} was to have {section.size} bytes, but {-left} more came")
    padding = bytes(_padded(section.size) - section.size)
    total.update(padding)
    _write_all(fd, padding)
    return total.hexdigest()


def _write_all(fd: int, data: Buffer) -> None:
    view = memoryview(data)
    while view.nbytes:
        view = view[os.write(fd, view) :]


@contextmanager
def _temporary(folder: Path) -> Iterator[tuple[int, Path]]:
    """A new locked file in a folder, closed in the end, and removed if it was not renamed."""
    fd, path = _locked_file(folder)
    try:
        yield fd, path
    except BaseException:
        with suppress(OSError):
            os.unlink(path)
        raise
    finally:
        os.close(fd)


def _locked_file(folder: Path) -> tuple[int, Path]:
    while True:
        path = folder / secrets.token_hex(8).join(_TEMPORARY)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # somebody who cleans up came in between, and takes it for a dead writer's
            os.close(fd)
            continue
        except OSError:  # a filesystem without locks: then nobody can lock it to remove it either
            return fd, path
        if os.fstat(fd).st_nlink:
            return fd, path
        os.close(fd)


def _space(folder: Path, needed: int, error: OSError) -> str:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    with suppress(OSError):
        return f" ({needed / 2**20:.0f} MiB are needed, {shutil.disk_usage(folder).free / 2**20:.0f} are free)"
    return ""
