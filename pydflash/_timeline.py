"""What one core session holds, token by token, and the places it can go back to.

Attention's rows can be cut anywhere, but recurrent state cannot: it is what the last token left behind. So the state is
kept now and then in host memory (a snapshot), and going back means the nearest snapshot at or before the place, and
evaluating the tokens in between again, in the chunks they had before.

Owns the order of prefill, snapshots and going back; the caller holds the session's lock.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from pydflash._lib import check, ffi, lib

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Progress:
    """How far the evaluation of a prompt has come.

    n_done, n_total: tokens of it, those counted that did not need to be evaluated again.
    tokens_per_second: of those evaluated so far. seconds_left: at that speed.
    """

    n_done: int
    n_total: int
    tokens_per_second: float
    seconds_left: float


class Snapshot(NamedTuple):
    """The state that the first n_committed tokens leave behind: uint8 [n_bytes], as pf_session_get_state gives it."""

    n_committed: int
    state: NDArray[np.uint8]


_place_of = attrgetter("n_committed")


def held_ids(session: Any) -> NDArray[np.int32]:
    """All ids of a pf_session, the pending one included: int32 [n_tokens]."""
    import numpy as np

    ids = np.empty(int(lib.pf_session_n_tokens(session)), np.int32)
    check(lib.pf_session_get_tokens(session, 0, len(ids), ffi.from_buffer("int32_t[]", ids)))
    return ids


class Timeline:
    """The tokens of one pf_session, and its snapshots.

    every: a snapshot every so many tokens of a prompt. memory: bytes that all snapshots may take.
    """

    def __init__(self, session: Any, *, n_batch: int, every: int, memory: int) -> None:
        self._session = session
        self._n_batch = n_batch
        self.every = every
        self._memory = memory
        self._snapshots: list[Snapshot] = []  # by n_committed

    @property
    def n_tokens(self) -> int:
        return int(lib.pf_session_n_tokens(self._session))

    @property
    def n_committed(self) -> int:
        return int(lib.pf_session_n_committed(self._session))

    @property
    def snapshots(self) -> list[Snapshot]:
        """All of them, by n_committed."""
        self._forget_behind(self.n_committed)  # an error may have reset the core
        return list(self._snapshots)

    def tokens(self) -> NDArray[np.int32]:
        """All ids, the pending one included: int32 [n_tokens]."""
        return held_ids(self._session)

    def clear(self) -> None:
        """Back to no tokens; the snapshots go too."""
        self.forget_snapshots()
        check(lib.pf_session_reset(self._session))

    def forget_snapshots(self) -> None:
        """Drops them all: the tokens are about to be others."""
        self._snapshots.clear()

    def replace_snapshots(self, snapshots: Iterable[Snapshot]) -> None:
        """Takes over the snapshots of a timeline whose tokens the core session has been given."""
        self._snapshots = sorted(snapshots, key=_place_of)
        self._thin()

    def snapshot(self) -> None:
        """Keeps the state as it stands, if there is none of this place yet."""
        import numpy as np

        n = self.n_committed
        at = bisect_left(self._snapshots, n, key=_place_of)
        if n == 0 or (at < len(self._snapshots) and self._snapshots[at].n_committed == n):
            return
        n_bytes = int(lib.pf_session_state_bytes(self._session, n))
        if n_bytes > self._memory:
            return
        state = np.empty(n_bytes, np.uint8)
        check(lib.pf_session_get_state(self._session, ffi.from_buffer("char[]", state), len(state)))
        self._snapshots.insert(at, Snapshot(n, state))
        self._thin()

    def common(self, ids: NDArray[np.int32]) -> int:
        """Tokens that the timeline and these ids begin with."""
        import numpy as np

        held = self.tokens()
        n = min(len(held), len(ids))
        differ = np.flatnonzero(held[:n] != ids[:n])
        return int(differ[0]) if len(differ) else n

    def reusable(self, ids: NDArray[np.int32]) -> int:
        """Of these ids, the tokens that `extend_to` would not evaluate again."""
        return self._place(min(self.common(ids), len(ids) - 1))

    def extend_to(
        self,
        ids: NDArray[np.int32],
        *,
        ends: Iterable[int] = (),
        n_total: int | None = None,
        progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> int:
        """Makes these ids the timeline, the last of them pending, and gives the number of tokens it did not evaluate.

        ids: int32 [n], at least one and at most n_ctx of them.
        ends: where messages end, in tokens; snapshots are kept there, but no two within n_batch tokens except the last.
        n_total: for progress, when these ids are only the beginning of what is to come.
        cancelled is asked before each chunk; what is evaluated by then stays.
        """
        n = len(ids)
        given = self.common(ids)
        kept = self._place(min(given, n - 1))
        if given < self.n_tokens or self.n_committed == n:  # else it goes on where it stands
            given = kept
            self.back_to(kept)
        self._forget_behind(self.n_committed)
        stops = self._stops(kept, n, ends)
        started = time.perf_counter()
        while given < n and not cancelled():
            # The last token given stays pending, so that one more is given than is evaluated.
            edge = (given // self._n_batch + 1) * self._n_batch
            due = bisect_right(stops, given - 1)
            if due < len(stops):
                edge = min(edge, stops[due])
            end = min(edge + 1, n)
            piece = ids[given:end]
            check(lib.pf_session_append(self._session, ffi.from_buffer("int32_t[]", piece), len(piece)))
            given = end
            if self.n_committed in stops:
                self.snapshot()
            if progress is not None:
                seconds = time.perf_counter() - started
                rate = (given - kept) / seconds if seconds > 0 else 0.0
                total = n if n_total is None else n_total
                progress(Progress(given, total, rate, (total - given) / rate if rate else 0.0))
        return kept

    def back_to(self, n: int) -> None:
        """To the first n tokens, committed, where a snapshot stands or at the beginning; nothing is pending then."""
        at = bisect_left(self._snapshots, n, key=_place_of)
        if n == self.n_committed:
            check(lib.pf_session_rewind(self._session, n, ffi.NULL, 0))  # drops what is pending
        elif n == 0:
            check(lib.pf_session_reset(self._session))
        else:
            state = self._snapshots[at].state
            check(lib.pf_session_rewind(self._session, n, ffi.from_buffer("char[]", state), len(state)))
        self._forget_behind(n)

    def _forget_behind(self, n: int) -> None:
        """Drops the snapshots of tokens that are gone, as they are when the core has reset itself after an error."""
        del self._snapshots[bisect_right(self._snapshots, n, key=_place_of) :]

    def _place(self, most: int) -> int:
        """The furthest place to go back to that holds at most so many tokens."""
        if self.n_committed <= most:
            return self.n_committed
        at = bisect_right(self._snapshots, most, key=_place_of)
        return self._snapshots[at - 1].n_committed if at else 0

    def _stops(self, start: int, n: int, ends: Iterable[int]) -> list[int]:
        """Where snapshots are due behind `start`, as counts of committed tokens."""
        marks = set(range(start // self.every * self.every + self.every, n, self.every))
        wanted = sorted({end for end in ends if start < end < n})
        last = start
        for end in wanted:
            if end - last >= self._n_batch or end == wanted[-1]:
                marks.add(end)
                last = end
        return sorted(marks | {n - 1})

    def _thin(self) -> None:
        """Drops the oldest but the first until all fit."""
        total = sum(len(snapshot.state) for snapshot in self._snapshots)
        while total > self._memory:
            total -= len(self._snapshots.pop(min(1, len(self._snapshots) - 1)).state)
