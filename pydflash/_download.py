"""One file of a hub's repository, brought into huggingface_hub's cache: resumed, and checked as it arrives.

huggingface_hub asks, authenticates and lays out the cache; the bytes are fetched here, over plain HTTP, since its own
download begins anew after a break and checks a file's size only. What has arrived is kept beside the blobs as
<hash>.incomplete, so that the next call goes on from there, in this process or another.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydflash.errors import HubError

BLOCK = 1 << 20
MAX_FAILURES = 5  # in a row, without a byte in between
FIRST_WAIT = 0.5  # seconds; twice as long each time
REPORT_EVERY = 0.1  # seconds


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub describes it.

    name: with folders, slashes between. size: bytes. digest: hexadecimal; 64 digits are the SHA-256 of its bytes, 40
    git's SHA-1 of it as a blob. The cache keeps it under this digest.
    """

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Download:
    """How far a download is.

    file: the one that is arriving. n_done, n_total: bytes of all that is being fetched, counting what an earlier call
    had fetched. bytes_per_second: since this call began. seconds_left: None until that is known.
    """

    file: str
    n_done: int
    n_total: int
    bytes_per_second: float
    seconds_left: float | None


class Stopped(BaseException):
    """Carries what the caller's own function raised past all that handles errors of the network and the disk."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class Meter:
    """Counts bytes and tells `report`, every so often and at the end."""

    def __init__(self, report: Callable[[Download], object] | None, n_total: int) -> None:
        self._report, self._n_total = report, n_total
        self._n_done = self._n_fetched = 0
        self._start, self._due = time.monotonic(), 0.0

    def add(self, file: str, n: int, fetched: bool = True) -> None:
        """n bytes more of the file, or fewer where n is negative; not fetched: they were there."""
        self._n_done += n
        self._n_fetched += n if fetched else 0
        now = time.monotonic()
        if self._report is None or (now < self._due and self._n_done < self._n_total):
            return
        self._due = now + REPORT_EVERY
        speed = max(0, self._n_fetched) / max(now - self._start, 1e-9)
        left = (self._n_total - self._n_done) / speed if speed else None
        try:
            self._report(Download(file, self._n_done, self._n_total, speed, left))
        except Exception as error:
            raise Stopped(error) from None


def n_missing(blobs: Path, file: RemoteFile) -> int:
    """Bytes of the file that the cache lacks."""
    if (blobs / file.digest).exists():
        return 0
    partial = _partial(blobs, file)
    return file.size - min(file.size, partial.stat().st_size if partial.exists() else 0)


def fetch(url: str, headers: dict[str, str], blobs: Path, file: RemoteFile, meter: Meter) -> None:
    """Brings the file to blobs/<digest>, unless it is there.

    Raises HubError when it is damaged, another process is at it, or the connection breaks too often; huggingface_hub's
    and httpx's errors for what the hub refuses; OSError for what the disk refuses.
    """
    blob = blobs / file.digest
    if blob.exists():
        meter.add(file.name, file.size, fetched=False)
        return
    blobs.mkdir(parents=True, exist_ok=True)
    partial = _partial(blobs, file)
    with partial.open("ab+") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HubError(f"{file.name} is being fetched by another process: wait for it", reason="busy") from None
        except OSError:
            pass  # a file system without locks
        if blob.exists():  # the other process was faster
            partial.unlink(missing_ok=True)
            meter.add(file.name, file.size, fetched=False)
            return
        found = _receive(url, headers, out, file, meter)
        if found != file.digest:
            partial.unlink()
            kind = "SHA-256" if len(found) == 64 else "SHA-1"
            raise HubError(
                f"{file.name} arrived damaged and was deleted: its {kind} is {found}, not {file.digest}; try again",
                reason="damaged",
            )
        out.flush()
        os.fsync(out.fileno())
        os.replace(partial, blob)


def hub_tools() -> Any:
    """huggingface_hub.utils, whose exports no type checker sees."""
    import huggingface_hub.utils

    return huggingface_hub.utils


def http_error() -> type[Exception]:
    """The root of the errors of huggingface_hub's HTTP client, which has had several names."""
    from huggingface_hub.errors import HfHubHTTPError

    root: type[Exception] = HfHubHTTPError.__bases__[0]
    return root


def _partial(blobs: Path, file: RemoteFile) -> Path:
    return blobs / f"{file.digest}.incomplete"


def _receive(url: str, headers: dict[str, str], out: Any, file: RemoteFile, meter: Meter) -> str:
    """Fetches what `out` lacks of the file; returns the digest of all of it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    tools, broken = hub_tools(), http_error()
    digest = _digest(file)
    n_done = 0

    def restart() -> None:
        nonlocal digest, n_done
        out.truncate(0)
        meter.add(file.name, -n_done)
        digest, n_done = _digest(file), 0

    out.seek(0, os.SEEK_END)
    if out.tell() > file.size:
        out.truncate(0)
    out.seek(0)
    while block := out.read(BLOCK):
        digest.update(block)
        n_done += len(block)
    if n_done:
        meter.add(file.name, n_done, fetched=False)
    n_failures = 0
    while n_done < file.size:
        before = n_done
        try:
            # The same size whatever the server thinks of compression, and a place to go on from.
            asked = headers | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={n_done}-"} if n_done else {})
            with tools.get_session().stream(
                "GET", url, headers=asked, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
            ) as response:
                if n_done and not _goes_on(response, n_done):
                    restart()
                if response.status_code != 416:
                    tools.hf_raise_for_status(response)
                    for block in response.iter_bytes(BLOCK):
                        if n_done + len(block) > file.size:
                            raise HubError(
                                f"{file.name} is longer than the {file.size:,} bytes the hub states: try again later",
                                reason="damaged",
                            )
                        out.write(block)
                        digest.update(block)
                        n_done += len(block)
                        meter.add(file.name, len(block))
            why = "the connection ended early"
        except HfHubHTTPError as error:
            if error.response.status_code not in (408, 429, 500, 502, 503, 504):
                raise
            why = f"the answer was {error.response.status_code}"
        except broken as error:
            why = str(error) or type(error).__name__
        out.flush()
        n_failures = 0 if n_done > before else n_failures + 1
        if n_done < file.size:
            if n_failures >= MAX_FAILURES:
                raise HubError(
                    f"{file.name} cannot be fetched: {why}; {n_done:,} of {file.size:,} bytes are here, run it again "
                    "to go on from there",
                    reason="network",
                )
            time.sleep(FIRST_WAIT * 2**n_failures)
    return str(digest.hexdigest())


def _goes_on(response: Any, n_done: int) -> bool:
    """Whether an answer to a request for the rest begins where it should; other errors are not judged here."""
    if response.status_code == 206:
        return str(response.headers.get("Content-Range", "")).startswith(f"bytes {n_done}-")
    return response.status_code not in (200, 416)


def _digest(file: RemoteFile) -> Any:
    if len(file.digest) == 64:
        return hashlib.sha256()
    return hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)


def disk_sentence(error: OSError, folder: Path) -> HubError:
    """What the disk's refusal means."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HubError(
            f"the disk is full: {folder} has no room left; what has arrived is kept, make room and run it again",
            reason="space",
            path=folder,
        )
    return HubError(
        f"cannot write to {folder}: {error.strerror or error}; set HF_HOME to another folder",
        reason="disk",
        path=folder,
    )
