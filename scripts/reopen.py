#!/usr/bin/env python3
"""Measure what it takes to reopen a long session against reading its text again, and to ask it something.

    python scripts/reopen.py --n-tokens 100000 --n-threads 2

One prefill of the standard library's sources on the pair that ships with pydflash, one save, then the file is opened
again: from the disk (its pages dropped from memory first) and from memory. The reopened session must say what the first
one goes on with. Prints a table: seconds on the clock, and of processor time, which a busy machine stretches less.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measuring import document, drop_cache, machine, say, table

import pydflash

QUESTION = "\n\nWhich function above opens a file, and what does it return when there is none?\n"
N_SAID = 32


def show(progress: pydflash.Progress) -> None:
    line = f"{progress.n_done:,} of {progress.n_total:,} tokens, {progress.seconds_left:.0f} s left"
    print(f"\r{line:<70}", end="", file=sys.stderr, flush=True)


class Clock:
    """Seconds on the clock, and of processor time, by what they went into."""

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = time.perf_counter() - started[0], time.process_time() - started[1]
        say(f"{name}: {self.seconds[name][0]:.2f} s")


def measure(path: Path, n_tokens: int, kv_type: str, n_threads: int | None) -> Clock:
    """Reads, saves, and reopens; SystemExit when the reopened session does not go on as the first one does."""
    clock = Clock()
    options: dict[str, Any] = {"n_threads": n_threads, "n_ctx": n_tokens + 1024}
    with pydflash.Session(kv_type=kv_type, **options) as session:
        ids = document(session, n_tokens)
        with clock("prefill"):
            session.append(ids, progress=show)
            print(file=sys.stderr)
        with clock("save"):
            session.save(path)
        said = session.generate(None, max_tokens=N_SAID, ignore_eos=True).ids
    drop_cache(path)
    with clock("plain read from disk"), path.open("rb", buffering=0) as file:
        while file.read(4 << 20):
            pass
    drop_cache(path)
    with clock("reopen from disk"):
        reopened = pydflash.Session.load(path, **options)
    with reopened:
        question = reopened.tokenize(QUESTION)
        with clock(f"question of {len(question)} tokens and the first of its answer"):
            reopened.append(question)
            reopened.generate(None, max_tokens=1, ignore_eos=True)
    with clock("reopen from memory"):
        reopened = pydflash.Session.load(path, **options)
    with reopened:
        if reopened.generate(None, max_tokens=N_SAID, ignore_eos=True).ids != said:
            raise SystemExit("the reopened session says something else than the one that was saved")
    return clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-tokens", type=int, default=100_000)
    parser.add_argument("--n-threads", type=int, default=None)
    parser.add_argument("--kv-type", default="f16")
    parser.add_argument("--file", type=Path, help="where the session is saved, and stays (a temporary file)")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = a.file or Path(folder) / "long.session"
        clock = measure(path, a.n_tokens, a.kv_type, a.n_threads)
        size = path.stat().st_size
    print(f"{machine()}; {a.n_tokens:,} tokens, KV {a.kv_type}, a file of {size / 1e6:.0f} MB\n")
    rows = [[name, f"{wall:.2f}", f"{cpu:.2f}"] for name, (wall, cpu) in clock.seconds.items()]
    print(table(["", "s", "processor s"], rows))


if __name__ == "__main__":
    main()
