"""The floor under a step: what its target pass takes at least on this machine, measured and not looked up.

Two things can't be had for less. Every weight passes the memory once, at the speed at which this machine reads so many
bytes. And each node costs its arithmetic, which is nearly all that a token takes in a prefill of a whole chunk. The
larger of the two is the floor. The drafter's work is not in it.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydflash import speed
from pydflash.bench import prompts

if TYPE_CHECKING:
    import os

    import pydflash

MOST = 1 << 30  # bytes that are read for the sake of measuring, at a time
TIMES = 5  # the fastest counts


@dataclass(frozen=True)
class Floor:
    """token_ms: of one token in a prefill. n_bytes: of weights and state that a pass must read; read_ms: what reading
    so many takes, 0 where that is not known (on a GPU)."""

    token_ms: float
    n_bytes: int
    read_ms: float

    def step_ms(self, n_nodes: float) -> float:
        """The least that a pass over so many nodes takes."""
        return max(n_nodes * self.token_ms, self.read_ms)

    def __str__(self) -> str:
        arithmetic = f"{self.token_ms:.3f} ms a node, as in a prefill"
        if not self.read_ms:
            return arithmetic
        rate = self.n_bytes / self.read_ms / 1e6
        return (
            f"{arithmetic}, or {self.read_ms:.3f} ms, in which this machine reads the {self.n_bytes / 1e6:,.1f} MB "
            f"that a pass must ({rate:.0f} GB/s), whichever is more"
        )


def measure(session: pydflash.Session, target: str | os.PathLike[str], n_threads: int) -> Floor:
    """Prefills and reads. Replaces the timeline."""
    n_bytes = speed.step_bytes(speed.read_pair(target), n_nodes=1, depth=0, kv_type=session.plan.kv_type).floor
    read_ms = n_bytes / read_speed(n_bytes, n_threads) * 1e3 if session.device == "cpu" else 0.0
    return Floor(prefill_ms(session), n_bytes, read_ms)


def prefill_ms(session: pydflash.Session) -> float:
    """Milliseconds that a token takes in a prefill of one whole chunk."""
    n = min(session.plan.n_batch, session.n_ctx - 1)
    ids = prompts.document(session, n + 1)  # the last one is not evaluated
    seconds = []
    for _ in range(TIMES):
        session.reset()
        started = time.perf_counter()
        session.append(ids)
        seconds.append(time.perf_counter() - started)
    return min(seconds) / n * 1e3


def read_speed(n_bytes: int, n_threads: int) -> float:
    """Bytes a second at which so many threads read so many bytes again and again, caches and all."""
    import numpy as np

    part = max(1, min(n_bytes, MOST) // n_threads)
    data = [np.ones(part, np.int8) for _ in range(n_threads)]
    again = max(1, MOST // (part * n_threads))

    def read(own: np.typing.NDArray[np.int8]) -> None:
        for _ in range(again):
            own.max()

    seconds = []
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(TIMES):
            started = time.perf_counter()
            list(pool.map(read, data))
            seconds.append(time.perf_counter() - started)
    return part * n_threads * again / min(seconds)
