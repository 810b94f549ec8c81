"""Documents that have been read once, as sessions in a folder: reading one again is a load, not a prefill.

An entry is a saved session (see `store`) named after what it is good for: KEY-N-IDS.session, with a hash of models and
settings, the number of tokens, and a hash of their ids. So a look-up is a listing and opens one file. The folder is
bounded in bytes, the entry that was not used for longest goes first. Several processes may share it: writers take turns
by a lock on the folder's `.lock`; readers need none, since what they have opened stays theirs when it is evicted.

The cache saves time and nothing else: whatever is wrong with an entry or the disk is a miss and a line in the log.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pydflash._timeline import Progress, Snapshot, Timeline, held_ids
from pydflash.errors import ModelFileError, SessionFileError, checked_path
from pydflash.store import Core, SavedSession, restore_into, save_session, stored_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


_ENTRY = re.compile(r"([0-9a-f]{32})-([0-9]{1,10})-([0-9a-f]{32})\.session")
_PATIENCE = 100  # tenths of a second to wait for another process's write; then this one is left out
_log = logging.getLogger("pydflash")


class DocumentCache:
    """The documents in a folder, at most max_bytes of them. SessionFileError when there can be no such folder."""

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        self.folder = checked_path(folder)
        self.max_bytes = max_bytes
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.folder / ".lock").touch(mode=0o600)
        except (OSError, ValueError) as error:  # ValueError: a NUL byte
            why = getattr(error, "strerror", None) or str(error)
            raise SessionFileError(
                f"documents cannot be kept in {self.folder}: {why}", path=self.folder, what=why
            ) from error

    def restore(
        self,
        core: Core,
        ids: NDArray[np.int32],
        *,
        more_than: int = 0,
        forget: Callable[[], None] = lambda: None,
    ) -> SavedSession | None:
        """Makes the longest entry that `ids` begin with the session's timeline, if it has more than so many tokens.

        Returns the entry, for its snapshots; the caller closes it. None: a miss, and the session is as it was, unless
        an entry broke while it was read for the second time, after which the session is empty.
        """
        import numpy as np

        for n, path in self._candidates(core, ids, more_than):
            saved = None
            try:
                saved = SavedSession(path)
                if not np.array_equal(saved.ids, ids[:n]):
                    raise saved.wrong("holds other tokens than its name says", "section 'ids'")
                restore_into(core, saved, forget=forget)
            except BaseException as error:
                if saved is not None:
                    saved.close()
                if not isinstance(error, SessionFileError):
                    raise
                if path.exists():  # else it has been evicted just now
                    _log.warning("document cache: %s; the entry is removed", error)
                    path.unlink(missing_ok=True)
            else:
                with suppress(OSError):
                    os.utime(path)
                return saved
        return None

    def prefill(
        self,
        core: Core,
        held: Timeline,
        ids: NDArray[np.int32],
        *,
        ends: Iterable[int] = (),
        progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> int:
        """As `Timeline.extend_to`, but what the folder has is loaded, and what it has not is put there.

        Only what is as long as the timeline's own snapshots are apart; up to the end of a message where there is one,
        so that another may follow it next time.
        """
        n = len(ids)
        edges = [end for end in ends if end < n]
        kept = held.reusable(ids)
        if n - kept >= held.every:
            entry = self.restore(core, ids, more_than=kept, forget=held.forget_snapshots)
            if entry is not None:
                with entry:
                    held.replace_snapshots(entry.read_snapshots())
                kept = held.reusable(ids)
        stored = kept
        for end in [*edges, n]:
            worth_it = end - stored >= held.every
            if worth_it or end == n:
                held.extend_to(ids[:end], ends=edges, n_total=n, progress=progress, cancelled=cancelled)
            if worth_it and not cancelled():
                self.put(core, snapshots=held.snapshots)
                stored = end
        return kept

    def put(self, core: Core, *, snapshots: Sequence[Snapshot]) -> bool:
        """Keeps what the session holds, and evicts what has no room beside it; whether it is there now."""
        ids = held_ids(core.session)
        try:
            key = _key(core)
        except (SessionFileError, ModelFileError) as error:
            _log.warning("document cache: %s", error)
            return False
        path = self.folder / f"{key}-{len(ids)}-{_hashes(ids, [len(ids)])[0]}.session"
        expected = stored_bytes(core, snapshots)
        if expected > self.max_bytes:
            _log.info("document cache: %d tokens take %d bytes, more than all of %s", len(ids), expected, self.folder)
            return False
        try:
            with self._locked():
                if path.exists():  # by another process, or a while ago
                    os.utime(path)
                    return True
                self._evict(self.max_bytes - expected)
                save_session(path, core, conversation=None, snapshots=snapshots, options={})
                self._evict(self.max_bytes)
                return path.exists()
        except (OSError, SessionFileError) as error:
            _log.warning("document cache: %s", error)
            return False

    def _candidates(self, core: Core, ids: NDArray[np.int32], more_than: int) -> list[tuple[int, Path]]:
        """Length and path of the entries that `ids` begin with, longest first."""
        found: dict[int, dict[str, str]] = {}  # by length: hash and name
        try:
            key = _key(core)
            names = os.listdir(self.folder)
        except (OSError, SessionFileError, ModelFileError) as error:
            _log.warning("document cache: %s", error)
            return []
        for name in names:
            if (entry := _ENTRY.fullmatch(name)) and entry[1] == key and more_than < int(entry[2]) <= len(ids):
                found.setdefault(int(entry[2]), {})[entry[3]] = name
        lengths = sorted(found)
        hashes = zip(lengths, _hashes(ids, lengths), strict=True)
        return [(n, self.folder / found[n][digest]) for n, digest in hashes if digest in found[n]][::-1]

    def _evict(self, most: int) -> None:
        """Removes entries, longest unused first, until they take at most so many bytes; the caller holds the lock."""
        entries = []
        for file in os.scandir(self.folder):
            if _ENTRY.fullmatch(file.name):
                with suppress(FileNotFoundError):  # removed as broken just now
                    status = file.stat()
                    entries.append((status.st_mtime_ns, file.path, status.st_size))
        total = sum(size for *_, size in entries)
        for _, path, size in sorted(entries):
            if total <= most:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= size

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / ".lock").open("w") as lock:
            for _ in range(_PATIENCE):
                with suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when it is closed, or the process dies
                    break
                time.sleep(0.1)
            else:
                raise OSError(errno.EBUSY, f"another process has been writing to {self.folder} for long")
            yield


def _key(core: Core) -> str:
    """What an entry must share with a session: models and settings, the device among them."""
    text = json.dumps([core.fingerprints(), core.settings()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _hashes(ids: NDArray[np.int32], lengths: Sequence[int]) -> list[str]:
    """A hash of the first n ids for each of the lengths, which rise."""
    total, done, hashes = hashlib.sha256(), 0, []
    for n in lengths:
        total.update(ids[done:n].astype("<i4").tobytes())
        done = n
        hashes.append(total.hexdigest()[:32])
    return hashes
