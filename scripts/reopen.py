#!/usr/bin/env python3
"""Measure what it takes to reopen a long session against reading its text again, and to ask it something.

    python scripts/reopen.py --n-tokens 100000 --n-threads 2

One prefill of the standard library's sources on the pair that ships with pydflash, one save, then the file is opened
again: from the disk (its pages dropped from memory first) and from memory. The reopened session must say what the first
one goes on with. Prints a table; --json gives the figures to programs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measuring import document, machine, say, table

import pydflash

QUESTION = "\n\nWhich function above opens a file, and what does it return when there is none?\n"
N_SAID = 32


def drop_pages(path: Path) -> None:
    """The next read of the file comes from the disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read(path: Path) -> float:
    """Seconds that reading the file from the disk takes, and nothing else."""
    drop_pages(path)
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(4 << 20):
            pass
    return time.perf_counter() - started


def show(progress: pydflash.Progress) -> None:
    line = f"{progress.n_done:,} of {progress.n_total:,} tokens, {progress.seconds_left:.0f} s left"
    print(f"\r{line:<70}", end="", file=sys.stderr, flush=True)


def measure(n_tokens: int, folder: Path, options: dict[str, Any]) -> dict[str, float]:
    """Seconds, and the file's bytes."""
    figures: dict[str, float] = {"tokens": n_tokens}
    path = folder / "long.session"
    clock = time.perf_counter
    with pydflash.Session(n_ctx=n_tokens + 1024, **options) as session:
        ids = document(session, n_tokens)
        started = clock()
        session.append(ids, progress=show)
        figures["prefill"] = clock() - started
        print(file=sys.stderr)
        started = clock()
        session.save(path)
        figures["save"] = clock() - started
        figures["bytes"] = path.stat().st_size
        said = session.generate(None, max_tokens=N_SAID, ignore_eos=True).ids
    figures["plain read from disk"] = plain_read(path)
    for name in ("reopen from disk", "reopen from memory"):
        if name == "reopen from disk":
            drop_pages(path)
        started = clock()
        reopened = pydflash.Session.load(path, n_ctx=n_tokens + 1024, n_threads=options["n_threads"])
        figures[name] = clock() - started
        with reopened:
            question = reopened.tokenize(QUESTION)
            say(f"{name}: {figures[name]:.2f} s")
            if name == "reopen from disk":
                started = clock()
                reopened.append(question)
                reopened.generate(None, max_tokens=1, ignore_eos=True)
                figures[f"question of {len(question)} tokens and the first of the answer"] = clock() - started
            elif reopened.generate(None, max_tokens=N_SAID, ignore_eos=True).ids != said:
                raise SystemExit("the reopened session says something else than the one that was saved")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-tokens", type=int, default=100_000)
    parser.add_argument("--n-threads", type=int, default=None)
    parser.add_argument("--kv-type", default="f16")
    parser.add_argument("--folder", type=Path, help="where the file goes while it is measured (a temporary folder)")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        figures = measure(a.n_tokens, Path(folder), {"n_threads": a.n_threads, "kv_type": a.kv_type})
    if a.json:
        print(json.dumps(figures))
        return
    size = figures.pop("bytes")
    n = int(figures.pop("tokens"))
    print(f"{machine()}; {n:,} tokens, a file of {size / 1e6:.0f} MB\n")
    print(table(["", "s"], [[name, f"{seconds:.2f}"] for name, seconds in figures.items()]))


if __name__ == "__main__":
    main()
