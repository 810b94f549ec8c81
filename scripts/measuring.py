"""What the measuring scripts share: a timeline with a clock, texts, memory, tables, and what to say of a machine.

A Timeline drives a session's core directly, since `Session.generate` neither shows the progress of a long prefill nor
goes on behind what it generated. It owns no model; it refuses nothing that the core does not refuse.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pydflash
from pydflash import options
from pydflash._lib import check, ffi, lib
from pydflash.bench import report
from pydflash.bench.answers import parted as parted
from pydflash.bench.prompts import document as document  # the scripts' long text, too
from pydflash.bench.prompts import library as library

ROOT = Path(__file__).resolve().parents[1]
Item = TypeVar("Item")
PROMPTS = ROOT / "tests" / "data" / "heldout_prompts.json"
BUDGET = 16  # nodes of the trees that are measured, Session's own default
DRAFTED: dict[str, Any] = {"budget": BUDGET, "copying": False}  # what the drafter alone is worth
PARTS = ("draft", "build", "verify", "accept", "commit")  # of a decode step, in order


# ---- running -----------------------------------------------------------------------------------------------------


@dataclass
class Decoded:
    """What some decode steps gave: times of each step on the clock, commit included, and of its parts."""

    ids: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    ms: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    n_copied: int = 0  # tokens that stood on the timeline before, and were proposed because of that

    @property
    def n_steps(self) -> int:
        return len(self.seconds)

    @property
    def per_pass(self) -> float:
        """Tokens per target pass."""
        return len(self.ids) / self.n_steps


@dataclass(frozen=True)
class Mark:
    """A place in a timeline to go back to: its committed tokens, their state, the token that was pending."""

    n_committed: int
    state: Any
    pending: int


class Timeline:
    """An open session's timeline, from its beginning: append tokens, decode behind them, go back, append more."""

    def __init__(self, session: pydflash.Session) -> None:
        self._session = session
        self._core = session._core.session
        self._n_batch = session.plan.n_batch
        check(lib.pf_session_reset(self._core))

    @property
    def n_tokens(self) -> int:
        return int(lib.pf_session_n_tokens(self._core))

    def append(self, ids: Sequence[int], after: Callable[[int, float], None] = lambda n, seconds: None) -> float:
        """Evaluates ids (the last stays pending) in slices of one batch; after(tokens of the slice, its seconds) is
        called behind each. Returns the seconds of all."""
        total = 0.0
        at = 0
        while at < len(ids):
            # Up to the next multiple of a batch, and one token that waits: as the core would cut the whole.
            end = (lib.pf_session_n_committed(self._core) // self._n_batch + 1) * self._n_batch + 1
            piece = list(ids[at : at + end - self.n_tokens])
            start = time.perf_counter()
            check(lib.pf_session_append(self._core, piece, len(piece)))
            seconds = time.perf_counter() - start
            total += seconds
            at += len(piece)
            after(len(piece), seconds)
        return total

    def mark(self) -> Mark:
        n = lib.pf_session_n_committed(self._core)
        size = lib.pf_session_state_bytes(self._core, n)
        state, pending = ffi.new("char[]", size), ffi.new("int32_t *")
        check(lib.pf_session_get_state(self._core, state, size))
        check(lib.pf_session_get_tokens(self._core, n, 1, pending))
        return Mark(n, state, pending[0])

    def back_to(self, mark: Mark) -> None:
        check(lib.pf_session_rewind(self._core, mark.n_committed, mark.state, len(mark.state)))
        check(lib.pf_session_append(self._core, [mark.pending], 1))

    def margin(self, a: int, b: int) -> float:
        """By how much the target prefers one of two likely tokens to the other, logits; goes on by one."""
        n_logprobs = lib.PF_MAX_LOGPROBS
        self.decode(1, budget=0, logprobs=n_logprobs)
        ids, logp = ffi.new("int32_t[]", n_logprobs), ffi.new("float[]", n_logprobs)
        check(lib.pf_session_logprobs(self._core, ffi.new("float *"), ids, logp))
        found = dict(zip(ids, logp, strict=True))
        return abs(found.get(a, -math.inf) - found.get(b, -math.inf))

    def decode(
        self,
        n_tokens: int,
        *,
        budget: int,
        chain: bool = False,
        copying: bool = True,
        n_steps: int | None = None,
        logprobs: int | None = None,
    ) -> Decoded:
        """Greedy tokens, exactly so many unless n_steps end it earlier; end tokens do not end it."""
        greedy: dict[str, Any] = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 0, "stop_ids": []}
        params, _keep = options.generate_params(
            **greedy, budget=budget, chain=chain, copying=copying, logprobs=logprobs
        )
        check(lib.pf_session_configure(self._core, params))
        step = ffi.new("pf_step_result *", {"size": ffi.sizeof("pf_step_result")})
        commit_ms = ffi.new("double *")
        out = Decoded()
        while len(out.ids) < n_tokens and out.n_steps != n_steps:
            start = time.perf_counter()
            check(lib.pf_session_step(self._core, n_tokens - len(out.ids), step))
            check(lib.pf_session_commit(self._core, step.n_tokens, commit_ms))
            out.seconds.append(time.perf_counter() - start)
            out.ids += ffi.unpack(step.tokens, step.n_tokens)
            out.n_copied += step.n_copied
            for part in PARTS[:-1]:
                out.ms[part].append(getattr(step, f"{part}_ms"))
            out.ms["commit"].append(commit_ms[0])
        return out


class Progress:
    """One line of stderr that says how far a prefill is, how fast, and how long it still takes."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done, self._shown = what, total, 0, 0.0
        self._first: tuple[int, float] | None = None  # tokens done, seconds a token

    def __call__(self, n: int, seconds: float) -> None:
        self._done += n
        cost = seconds / n
        self._first = self._first or (self._done, cost)
        now = time.perf_counter()
        if now - self._shown < 0.5 and self._done < self._total:
            return
        self._shown = now
        # Attention makes a token cost a + b * depth, so the clock must not be read from the average so far.
        rest = self._total - self._done
        slope = max(0.0, cost - self._first[1]) / max(1, self._done - self._first[0])
        left = rest * (cost + slope * rest / 2)
        line = f"{self._what}: {self._done:,} of {self._total:,} tokens, {1 / cost:,.0f} tokens/s, {left:.0f} s left"
        print(f"\r{line:<100}", end="" if rest > 0 else "\n", file=sys.stderr, flush=True)


def counted(what: str, items: Sequence[Item]) -> Iterator[Item]:
    """The items, with a line of stderr that says which it is and how long the rest still takes."""
    start = time.perf_counter()
    for i, item in enumerate(items):
        left = f", {(time.perf_counter() - start) / i * (len(items) - i):.0f} s left" if i else ""
        print(f"\r{f'{what}: {i + 1} of {len(items)}{left}':<100}", end="", file=sys.stderr, flush=True)
        yield item
    print(file=sys.stderr)


def drop_cache(path: Path) -> None:
    """Asks the kernel to forget the file's pages; it does when nobody maps them."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Says how long a part took."""
    start = time.perf_counter()
    yield
    say(f"{what}: {time.perf_counter() - start:.1f} s")


# ---- memory ------------------------------------------------------------------------------------------------------


def anonymous_mib() -> float:
    """Memory of this process that no file stands behind and that has been touched, MiB: not the mapped weights."""
    return _status_mib("RssAnon")


def resident_mib() -> float:
    """Memory of this process that is there now, files that are mapped included, MiB."""
    return _status_mib("VmRSS")


def allocated_mib() -> float:
    """Memory of this process that was asked for, MiB, touched or not: buffers for a long context fill as it grows."""
    return _status_mib("VmData")


def available_memory() -> int:
    """Memory of the machine that could be had, bytes."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) << 10 if found else 0


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    return float("nan")


# ---- texts -------------------------------------------------------------------------------------------------------


def heldout(session: pydflash.Session, names: Sequence[str], count: int, length: int) -> list[list[int]]:
    """`count` prompts of `length` tokens, spread evenly over those files of the standard library."""
    text = "".join((library() / name).read_text(encoding="utf-8") for name in names if (library() / name).exists())
    ids = session.tokenize(text)
    if len(ids) <= length:
        raise pydflash.PydflashError(
            f"the held-out files have {len(ids)} tokens, no more than the {length} of a prompt"
        )
    step = (len(ids) - length) / max(1, count - 1)
    return [ids[round(i * step) : round(i * step) + length] for i in range(count)]


# ---- what is written ---------------------------------------------------------------------------------------------


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """As `pydflash.bench.report.write_csv`, into a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report.write_csv(path, rows)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["-"] * len(header), *rows]
    return "\n".join("|" + "|".join("-" if line is lines[1] else f" {cell} " for cell in line) + "|" for line in lines)


def processor() -> str:
    """The processor's name as the kernel tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine() -> str:
    """Processor, cores, versions."""
    return (
        f"{processor()}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, pydflash {pydflash.__version__}"
    )


def fingerprint(path: Path) -> str:
    """16 hex digits that stand for a file, or for a folder's files by name: the beginning of a SHA-256."""
    total = hashlib.sha256()
    for part in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            total.update(f"{part.name}\0".encode())
        with part.open("rb") as file:
            while block := file.read(1 << 22):
                total.update(block)
    return total.hexdigest()[:16]
