"""Sessions as files: all that one holds, and which models and settings it came from. What is in a file:

    meta          both models' paths and fingerprints, every setting that shapes the state, where the snapshots stand,
                  and the caller's own options
    ids           int32, all tokens, the pending one included
    conversation  the caller's, as JSON
    state         recurrent and convolution state and the drafter's ring, as pf_session_get_state gives them
    snapshot.N    the same as it was after the first N tokens
    kv.I          rows [0, n_committed) of cache tensor I

What is read is believed only as far as it was checked: whether models, settings, ids and every size are those of the
session that is to take it, then the checksums of all sections; then the session is touched. How a file stays whole is
`_container`'s to know.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

from pydflash import _container
from pydflash._fingerprint import fingerprint
from pydflash._handles import Models, identity
from pydflash._lib import c_path, check, ffi, lib
from pydflash._timeline import Snapshot, held_ids
from pydflash.errors import ArgumentError, ContextFullError, SessionFileError
from pydflash.plan import read_plan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    State: TypeAlias = NDArray[np.uint8]

LAYOUT = 1  # of states and rows; counted up when the core changes what their bytes mean
_SETTINGS = {"layout": int, "byteorder": str, "kv_type": list, "n_batch": int, "n_ring": int, "device": str}
_MAX_JSON = 1 << 30


@dataclass(frozen=True)
class Core:
    """A pf_session and the models it runs on; the caller holds its lock."""

    session: Any
    models: Models

    def fingerprints(self) -> dict[str, str | None]:
        """Of both models, as they were opened; None for no drafter."""
        return {role: self._fingerprint(role) for role in ("target", "draft")}

    def _fingerprint(self, role: str) -> str | None:
        path = getattr(self.models, role)
        if path is None:
            return None
        known = self.models.fingerprints
        if role not in known:
            if identity(path) != self.models.identities[role]:
                raise SessionFileError(
                    f"{path} is no longer the file that this session was opened with, so what it holds cannot be saved",
                    path=path,
                    where=role,
                )
            known[role] = fingerprint(path)
        return known[role]

    def settings(self) -> dict[str, Any]:
        """What decides, besides the models, what the session's state looks like, and by which rounding it came about.

        What follows from these (rotations, types of features) is not listed.
        """
        plan = read_plan(lambda out: lib.pf_session_get_plan(self.session, out))
        return {
            "layout": LAYOUT,
            "byteorder": sys.byteorder,
            "kv_type": list(plan.kv_type),
            "n_batch": plan.n_batch,
            "n_ring": plan.n_ring,
            "device": plan.device,
        }


def save_session(
    path: str | os.PathLike[str],
    core: Core,
    *,
    conversation: Any,
    snapshots: Iterable[Snapshot],
    options: Mapping[str, Any],
) -> int:
    """Writes a session to a file, or over the one that is there; returns the file's size in bytes.

    conversation, options: what JSON can say, given back as they are.
    snapshots: by rising n_committed.
    Needs a few MB of memory, whatever the session holds. SessionFileError when the file cannot be written,
    ArgumentError when the conversation is not JSON; a file that was there is untouched then.
    """
    import numpy as np

    c_path(path)  # refuses what no path can be
    session, kept = core.session, list(snapshots)
    n_committed = int(lib.pf_session_n_committed(session))
    state = np.empty(_state_bytes(session, n_committed), np.uint8)
    check(lib.pf_session_get_state(session, ffi.from_buffer("char[]", state), len(state)))
    try:
        said = json.dumps(conversation).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"the session's messages cannot be saved: {error}") from None
    paths = {"target": core.models.target, "draft": core.models.draft}
    meta = {
        "kind": "session",
        "models": {
            role: None if digest is None else {"path": os.path.abspath(str(paths[role])), "fingerprint": digest}
            for role, digest in core.fingerprints().items()
        },
        "settings": core.settings(),
        "options": dict(options),
        "n_committed": n_committed,
        "snapshots": [n for n, _ in kept],
    }
    sections = [
        _whole("ids", memoryview(held_ids(core.session).tobytes())),
        _whole("conversation", memoryview(said)),
        _whole("state", state.data),
        *(_whole(f"snapshot.{n}", one.data) for n, one in kept),
        *(_rows_section(session, tensor, n_committed) for tensor in range(lib.pf_session_n_kv(session))),
    ]
    return _container.write(path, meta, sections)


class SavedSession:
    """An open file of a session, of which header, ids and conversation have been read and checked; a context manager.

    settings: see `Core.settings`. options, conversation: the caller's. models: by role, path and fingerprint, or None
    for no drafter. ids: int32 [n_tokens]; the first n_committed have been evaluated, and at most one has not.
    snapshots: n_committed of each. SessionFileError for a file that is none, or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        c_path(path)  # refuses what no path can be
        self.path = os.fspath(path)
        self.file = _container.Container(path)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closing twice is fine."""
        self.file.close()

    def __enter__(self) -> SavedSession:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def read_snapshots(self) -> Iterator[Snapshot]:
        """Each, by rising n_committed; after `restore_into`, which has checked them."""
        for n in self.snapshots:
            yield Snapshot(n, self.read_state(f"snapshot.{n}"))

    def read_state(self, name: str) -> State:
        """A section as uint8, its checksum not asked for again."""
        import numpy as np

        section = self.file.section(name)
        state = np.empty(section.size, np.uint8)
        self.file.read_into(section, 0, state.data)
        return state

    def wrong(self, what: str, where: str = "") -> SessionFileError:
        """Why this file cannot be used."""
        return SessionFileError(f"{self.path} {what}", path=self.path, what=what, where=where)

    def _read(self) -> None:
        import numpy as np

        if self.file.meta.get("kind") != "session":
            raise self.wrong("is not a saved session")
        self.settings: dict[str, Any] = self._field("settings", dict)
        self.options: dict[str, Any] = self._field("options", dict)
        self.models: dict[str, dict[str, str] | None] = self._field("models", dict)
        self.n_committed: int = self._field("n_committed", int)
        self.snapshots: list[int] = self._field("snapshots", list)
        for role in ("target", "draft"):
            model = self.models.get(role)
            if model is None and role == "draft":
                continue
            if not isinstance(model, dict) or not all(type(model.get(part)) is str for part in ("path", "fingerprint")):
                raise self.wrong(f"does not say with which {role} it was saved", "models")
        for name, kind in _SETTINGS.items():
            if type(self.settings.get(name)) is not kind:
                raise self.wrong(f"does not say with which {name} it was saved", "settings")
        places = [0, *self.snapshots, self.n_committed + 1]
        if not all(type(n) is int for n in places) or not all(a < b for a, b in pairwise(places)):
            raise self.wrong(f"has snapshots that are not in order within its {self.n_committed} tokens", "snapshots")
        data = self.file.read("ids", at_most=4 * (self.n_committed + 1))
        if len(data) % 4 or len(data) // 4 < self.n_committed:
            raise self.wrong(f"has {len(data)} bytes of ids for {self.n_committed} committed tokens", "section 'ids'")
        self.ids: NDArray[np.int32] = np.frombuffer(data, np.int32)
        try:
            self.conversation: Any = json.loads(self.file.read("conversation", at_most=_MAX_JSON))
        except (ValueError, RecursionError) as error:
            raise self.wrong(f"holds a conversation that is not JSON: {error}", "section 'conversation'") from error

    def _field(self, name: str, kind: type) -> Any:
        value = self.file.meta.get(name)
        if type(value) is not kind:
            raise self.wrong(f"does not say its {name}", name)
        return value


def restore_into(core: Core, saved: SavedSession, *, forget: Callable[[], None] = lambda: None) -> None:
    """Makes a saved session the timeline of another one, its pending token pending.

    forget: called when all has been checked, right before the session's own timeline goes.

    The session goes on with exactly the tokens the saved one would have said; on another device, as exactly as that
    one rounds alike. Rows are read twice, first for their checksums and then from the page cache, a few MB at a time.
    Raises as `check_fits`, and SessionFileError for a damaged file; the session is then as it was, but empty when the
    file failed while it was read for the second time.
    """
    check_fits(core, saved)
    saved.file.verify()
    session = core.session
    state = saved.read_state("state")
    forget()
    check(lib.pf_session_reset(session))
    try:
        for tensor in range(lib.pf_session_n_kv(session)):
            section = saved.file.section(f"kv.{tensor}")
            row_bytes, buffer = _row_buffer(session, tensor)
            for first, n in _pieces(saved.n_committed, len(buffer) // row_bytes):
                rows = memoryview(buffer)[: n * row_bytes]
                saved.file.read_into(section, first * row_bytes, rows)
                check(lib.pf_session_set_kv(session, tensor, first, n, ffi.from_buffer("char[]", rows), rows.nbytes))
        ids = ffi.from_buffer("int32_t[]", saved.ids)
        check(lib.pf_session_restore(session, ids, saved.n_committed, ffi.from_buffer("char[]", state), len(state)))
        n_pending = len(saved.ids) - saved.n_committed
        check(lib.pf_session_append(session, ids + saved.n_committed, n_pending))  # one is not evaluated by that
    except BaseException as error:
        lib.pf_session_reset(session)
        if isinstance(error, ArgumentError):
            raise saved.wrong(f"holds what does not belong together: {error}") from error
        raise


def stored_bytes(core: Core, snapshots: Iterable[Snapshot]) -> int:
    """About how large a file a session makes, in bytes: its conversation is left out."""
    session = core.session
    n_committed = int(lib.pf_session_n_committed(session))
    row_bytes = sum(int(lib.pf_session_kv_row_bytes(session, i)) for i in range(lib.pf_session_n_kv(session)))
    states = _state_bytes(session, n_committed) + sum(state.nbytes for _, state in snapshots)
    return n_committed * (row_bytes + 4) + states


def check_fits(core: Core, saved: SavedSession) -> None:
    """Whether a saved session was made by these models and settings and has every size that they give it; reads none of
    the sections. SessionFileError, or ContextFullError when n_ctx is too small."""
    for name, value in core.settings().items():
        there = saved.settings.get(name)
        if name != "device" and there != value:
            raise saved.wrong(f"was saved with {name}={there!r}, but this session has {name}={value!r}", name)
    for role, digest in core.fingerprints().items():
        model = saved.models.get(role)
        if (model is None) != (digest is None):
            have, lack = ("without", "has one") if model is None else ("with", "has none")
            raise saved.wrong(f"was saved {have} a {role}, but this session {lack}", role)
        if model is not None and model.get("fingerprint") != digest:
            ours = core.models.target if role == "target" else core.models.draft
            raise saved.wrong(
                f"was saved with another {role} than {ours}: with {model.get('path')}, as it was then", role
            )
    n_ctx = int(lib.pf_session_n_ctx(core.session))
    n_tokens = len(saved.ids)
    if n_tokens > n_ctx:
        raise ContextFullError(
            f"{saved.path} holds {n_tokens} tokens, {n_tokens - n_ctx} too many for n_ctx={n_ctx}: open it with a "
            "larger n_ctx",
            path=saved.path,
            need=n_tokens,
            free=n_ctx,
        )
    if n_tokens and not 0 <= int(saved.ids.min()) <= int(saved.ids.max()) < core.models.n_vocab:
        raise saved.wrong(f"holds token ids that are not below {core.models.n_vocab}, the vocabulary", "section 'ids'")
    sizes = {"state": _state_bytes(core.session, saved.n_committed)}
    sizes |= {f"snapshot.{n}": _state_bytes(core.session, n) for n in saved.snapshots}
    for tensor in range(lib.pf_session_n_kv(core.session)):
        sizes[f"kv.{tensor}"] = saved.n_committed * int(lib.pf_session_kv_row_bytes(core.session, tensor))
    found = {name: section.size for name, section in saved.file.sections.items()}
    for name in sizes.keys() | (found.keys() - {"ids", "conversation"}):
        if sizes.get(name) != found.get(name):
            there, here = found.get(name, "no"), sizes.get(name, "none")
            raise saved.wrong(f"has {there} bytes of {name}; here it must have {here}", f"section {name!r}")


def _whole(name: str, data: memoryview) -> _container.NewSection:
    return _container.NewSection(name, data.nbytes, [data])


def _rows_section(session: Any, tensor: int, n_rows: int) -> _container.NewSection:
    def blocks() -> Iterator[memoryview]:
        row_bytes, buffer = _row_buffer(session, tensor)
        for first, n in _pieces(n_rows, len(buffer) // row_bytes):
            rows = memoryview(buffer)[: n * row_bytes]
            check(lib.pf_session_get_kv(session, tensor, first, n, ffi.from_buffer("char[]", rows), rows.nbytes))
            yield rows

    return _container.NewSection(f"kv.{tensor}", n_rows * int(lib.pf_session_kv_row_bytes(session, tensor)), blocks())


def _row_buffer(session: Any, tensor: int) -> tuple[int, bytearray]:
    """Bytes of a cache tensor's row, and room for about as many rows as are moved at once."""
    row_bytes = int(lib.pf_session_kv_row_bytes(session, tensor))
    return row_bytes, bytearray(max(1, _container.BLOCK // row_bytes) * row_bytes)


def _pieces(n: int, at_once: int) -> Iterator[tuple[int, int]]:
    for first in range(0, n, at_once):
        yield first, min(at_once, n - first)


def _state_bytes(session: Any, n: int) -> int:
    return int(lib.pf_session_state_bytes(session, n))
