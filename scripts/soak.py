#!/usr/bin/env python3
"""Turns upon turns on one session for as long as you like: memory must stay flat.

    python scripts/soak.py                      # an hour on the pair that ships
    python scripts/soak.py --minutes 5 --seed 3

Random turns of everything that a conversation does: text and messages put in, questions asked and cancelled, streams
left in the middle, going back, forks, sessions saved and opened again. A line a minute says how many, how much memory
the process has resident, how much of it once malloc has handed back what nobody uses, and what the session's own
buffers take. The first fifth, at most five minutes, warms up: from then on the second of these may grow by --bound MiB
and no more, else the exit code is 1. What turns say is not looked at here; the tests do that.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measuring import resident_mib

from pydflash import Checkpoint, Session
from pydflash.plan import MIB

LINES = Path(__file__).read_text().splitlines(keepends=True)  # whole ones: a tokenizer remembers every word it has seen
QUESTIONS = ("What does this do?", "Write a function that adds two numbers.", "Why?", "And then?", "Explain `yield`.")


class Soak:
    """One session that lives as long as the soak, and others that come from it and are closed again."""

    def __init__(self, options: dict[str, Any], *, seed: int, folder: Path) -> None:
        self.options = options
        self.random = random.Random(seed)
        self.path = folder / "session"
        # Small states, and room for few: kept ones soon take all they may.
        self.session = Session(
            n_ctx=4096, n_batch=128, n_ring=256, checkpoint_every=256, checkpoint_memory="8MiB", **options
        )
        self.checkpoints: list[Checkpoint] = []
        self.done: Counter[str] = Counter()
        self.n_tokens = 0  # said

    def close(self) -> None:
        self.session.close()

    def fill(self) -> None:
        """Every page of the caches written once, and every kind of turn taken."""
        ids = self.session.tokenize("".join(LINES))
        self.session.append((ids * 10)[: self.session.n_ctx - 64])
        self.session.generate(None, max_tokens=32)
        for turn in self.turns():
            self.take(turn)

    def turns(self) -> list[Callable[[], None]]:
        return [self.append, self.ask, self.leave, self.cancel, self.keep, self.rewind, self.fork, self.save_and_load]

    def turn(self) -> None:
        self.take(self.random.choices(self.turns(), weights=(4, 6, 3, 2, 3, 3, 1, 1))[0])

    def take(self, turn: Callable[[], None]) -> None:
        if self.session.n_tokens > self.session.n_ctx - 1024:
            self.session.reset()
            self.checkpoints.clear()
        turn()
        self.done[turn.__name__.replace("_", " ")] += 1

    # ---- turns

    def settings(self) -> dict[str, Any]:
        """Of a run: greedy or drawn, any tree."""
        pick = self.random.choice
        return {
            "max_tokens": self.random.randint(1, 48), "temperature": pick([0.0, 0.7, 1.2]), "top_p": pick([1.0, 0.9]),
            "seed": self.random.randrange(1 << 32), "budget": pick([0, 4, 16, 24]), "chain": pick([False, True]),
            "repeat_penalty": pick([1.0, 1.1]), "logprobs": pick([None, None, 3]),
        }  # fmt: skip

    def append(self) -> None:
        start = self.random.randrange(len(LINES))
        text = "".join(LINES[start : start + self.random.randint(1, 40)])
        self.session.append(text if self.random.random() < 0.5 else [{"role": "user", "content": text}])

    def ask(self) -> None:
        self.n_tokens += len(self.session.ask(self.random.choice(QUESTIONS), **self.settings()).ids)

    def leave(self) -> None:
        """A stream that nobody reads to its end."""
        chunks = self.session.stream_ask(self.random.choice(QUESTIONS), **self.settings())
        for _, chunk in zip(range(self.random.randint(1, 5)), chunks, strict=False):
            self.n_tokens += chunk.accepted

    def cancel(self) -> None:
        timer = threading.Timer(self.random.uniform(0.0, 0.05), self.session.cancel)
        timer.start()
        self.n_tokens += len(self.session.ask(self.random.choice(QUESTIONS), **self.settings()).ids)
        timer.cancel()
        timer.join()

    def keep(self) -> None:
        self.checkpoints = [*self.checkpoints[-4:], self.session.checkpoint()]

    def rewind(self) -> None:
        n = self.session.n_tokens
        kept = [checkpoint for checkpoint in self.checkpoints if checkpoint.n_tokens <= n]
        if kept and self.random.random() < 0.7:
            self.checkpoints = kept
            self.session.rewind(kept[-1])
        else:
            self.checkpoints.clear()
            self.session.rewind(self.random.randint(0, n))

    def fork(self) -> None:
        with self.session.fork() as twin:
            self.n_tokens += len(twin.ask(self.random.choice(QUESTIONS), **self.settings()).ids)

    def save_and_load(self) -> None:
        self.session.save(self.path)
        with Session.load(self.path, n_threads=self.options["n_threads"]) as twin:
            self.n_tokens += len(twin.ask(self.random.choice(QUESTIONS), **self.settings()).ids)


def resident_and_used() -> tuple[float, float]:
    """MiB of this process: as it stands, and without the free memory that malloc keeps for later."""
    gc.collect()
    resident = resident_mib()
    ctypes.CDLL(None).malloc_trim(0)
    return resident, resident_mib()


def grown(used: list[float], n_warm: int) -> float:
    """By how much memory grew: the most there ever was behind the first n_warm measurements, over the most there."""
    return max(used[n_warm:]) - max(used[:n_warm])


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="random turns on one session; exit code 1 when memory grows")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--bound", type=float, default=16, help="MiB that memory in use may grow by (default 16)")
    parser.add_argument("--target", type=Path, help="a GGUF (default: the pair that ships)")
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    a = parse_arguments(arguments)
    options = {"target": a.target, "draft": a.draft, "device": a.device, "n_threads": a.threads}
    line = min(60.0, a.minutes * 60 / 10)  # seconds between two lines, so that a short run has ten too
    n_lines = max(2, round(a.minutes * 60 / line))
    n_warm = max(1, min(n_lines // 5, round(300 / line)))
    used: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(options, seed=a.seed, folder=Path(folder))
        soak.fill()
        started = time.monotonic()
        for at in range(1, n_lines + 1):
            before = soak.done.total()
            while time.monotonic() < started + at * line:
                soak.turn()
            resident, in_use = resident_and_used()
            used.append(in_use)
            buffers = sum(soak.session.memory.values()) / MIB
            print(
                f"{at * line / 60:5.1f} min  {soak.done.total() - before:5d} turns  {resident:7.1f} MiB resident  "
                f"{in_use:7.1f} in use  {buffers:7.2f} MiB of session buffers"
                f"{'  (warming up)' if at <= n_warm else ''}",
                flush=True,
            )
        soak.close()
    growth = grown(used, n_warm)
    kinds = ", ".join(f"{n} {kind}" for kind, n in soak.done.most_common())
    print(f"{soak.done.total()} turns ({kinds}), {soak.n_tokens} tokens said")
    print(f"memory in use grew by {growth:.1f} MiB behind the warm-up; {a.bound:g} are allowed")
    return 1 if growth > a.bound else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
