#!/usr/bin/env python3
"""Turns upon turns on one session for as long as you like: memory must stay flat.

    python scripts/soak.py                      # an hour on the pair that ships
    python scripts/soak.py --minutes 5 --seed 3

Random turns of everything that a conversation does: text, messages and documents put in, questions asked, held to a
format and cancelled, streams left in the middle, going back, forks, sessions saved and opened again, prompts kept on
disk. A line a minute empties the session and says how many turns there were, what is allocated then, what of the
process is resident once malloc has handed back what nobody uses, and what the session's buffers take.

Caches fill in the first half. Over the second a line is fitted to each of the two. The exit code is 1 when what is
allocated rises by more than --allocated bytes a turn (what is not freed), or what is resident, which goes up and down
with the graphs that are kept, by more than --resident MiB in all (memory torn to pieces). What turns say is not looked
at here; the tests do that.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import linear_regression
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
from measuring import anonymous_mib

from pydflash import Checkpoint, Session
from pydflash.plan import MIB

LINES = Path(__file__).read_text().splitlines(keepends=True)  # whole ones: a tokenizer remembers every word it has seen
QUESTIONS = ("What does this do?", "Write a function that adds two numbers.", "Why?", "And then?", "Explain `yield`.")


class Soak:
    """One session that lives as long as the soak, and others that come from it and are closed again."""

    def __init__(self, options: dict[str, Any], *, seed: int, folder: Path) -> None:
        self.options = options
        self.random = random.Random(seed)
        self.path, self.cache = folder / "session", folder / "cache"
        # Small states, and room for few: kept ones soon take all they may.
        shape = {"n_ctx": 4096, "n_batch": 128, "n_ring": 256, "checkpoint_every": 256, "checkpoint_memory": "8MiB"}
        self.opening = {**shape, **options}
        self.session = Session(**self.opening)
        self.checkpoints: list[Checkpoint] = []
        self.done: Counter[str] = Counter()
        self.n_tokens = 0  # said

    def close(self) -> None:
        self.session.close()

    def fill(self) -> None:
        """Every page of the caches written once, and every kind of turn taken."""
        # numpy keeps seven freed blocks of every size below 1 KiB.
        blocks = [np.empty(size, np.uint8) for size in range(1, 1024) for _ in range(7)]
        del blocks
        ids = self.session.tokenize("".join(LINES))
        self.session.append((ids * 10)[: self.session.n_ctx - 64])
        self.session.generate(None, max_tokens=32)
        for turn in self.turns():
            self.take(turn)

    def turns(self) -> list[Callable[[], None]]:
        often = [self.append, self.ask, self.leave, self.cancel, self.keep, self.rewind]
        return [*often, self.hold, self.document, self.fork, self.save_and_load, self.keep_on_disk]

    def turn(self) -> None:
        self.take(self.random.choices(self.turns(), weights=(4, 6, 3, 2, 3, 3, 1, 1, 1, 1, 1))[0])

    def take(self, turn: Callable[[], None]) -> None:
        if self.session.n_tokens > self.session.n_ctx - 1536:
            self.empty()
        turn()
        self.done[turn.__name__.replace("_", " ")] += 1

    def empty(self) -> None:
        """No tokens, and nothing kept."""
        self.session.reset()
        self.checkpoints.clear()

    # ---- turns

    def settings(self) -> dict[str, Any]:
        """Of a run: greedy or drawn, any tree."""
        pick = self.random.choice
        return {
            "max_tokens": self.random.randint(1, 48), "temperature": pick([0.0, 0.7, 1.2]), "top_p": pick([1.0, 0.9]),
            "seed": self.random.randrange(1 << 32), "budget": pick(["auto", 0, 4, 24]), "chain": pick([False, True]),
            "repeat_penalty": pick([1.0, 1.1]), "logprobs": pick([None, None, 3]),
        }  # fmt: skip

    def text(self) -> str:
        start = self.random.randrange(len(LINES))
        return "".join(LINES[start : start + self.random.randint(1, 40)])

    def append(self) -> None:
        text = self.text()
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

    def hold(self) -> None:
        """An answer in a format."""
        pattern = f"[a-z]{{1,{self.random.randint(2, 9)}}}: [0-9]+"
        wanted = {**self.settings(), "response_format": {"type": "regex", "regex": pattern}}
        self.n_tokens += len(self.session.ask(self.random.choice(QUESTIONS), **wanted).ids)

    def document(self) -> None:
        path = self.path.with_suffix(".py")
        path.write_text(f"# {QUESTIONS[0]}\n{self.text()}")  # there are empty lines, and empty documents are refused
        self.session.append_document(path)

    def fork(self) -> None:
        with self.session.fork() as twin:
            self.n_tokens += len(twin.ask(self.random.choice(QUESTIONS), **self.settings()).ids)

    def save_and_load(self) -> None:
        self.session.save(self.path)
        with Session.load(self.path, n_threads=self.options["n_threads"]) as twin:
            self.n_tokens += len(twin.ask(self.random.choice(QUESTIONS), **self.settings()).ids)

    def keep_on_disk(self) -> None:
        """A long prompt in a session that keeps it, or finds it kept; more of them than there is room for."""
        start = self.random.randrange(len(LINES) // 2)
        with Session(cache_dir=self.cache, cache_size="8MiB", **self.opening) as other:
            other.append("".join(LINES[start : start + 40]))


class Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
                     "keepcost")
    ]  # fmt: skip


def allocated_and_resident() -> tuple[float, float]:
    """MiB of this process that somebody has allocated and not freed, and that are in memory, files apart."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Mallinfo
    libc.malloc_trim(0)
    info = libc.mallinfo2()
    return (info.uordblks + info.hblkhd) / MIB, anonymous_mib()


def slope(turns: Sequence[int], mib: Sequence[float]) -> float:
    """Bytes a turn by which memory rises: the line of least squares through it."""
    return linear_regression(turns, mib).slope * MIB


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="random turns on one session; exit code 1 when memory grows")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--allocated", type=float, default=64, help="bytes a turn it may rise (default %(default)g)")
    parser.add_argument("--resident", type=float, default=8, help="MiB it may rise in all (default %(default)g)")
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
    n_lines = max(4, round(a.minutes * 60 / line))
    turns: list[int] = []
    memory: list[tuple[float, float]] = []  # MiB allocated, resident
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(options, seed=a.seed, folder=Path(folder))
        soak.fill()
        started = time.monotonic()
        for at in range(1, n_lines + 1):
            soak.turn()
            while time.monotonic() < started + at * line:
                soak.turn()
            soak.empty()
            turns.append(soak.done.total())
            memory.append(allocated_and_resident())
            buffers = sum(soak.session.memory.values()) / MIB
            print(
                f"{at * line / 60:5.1f} min  {turns[-1]:6d} turns  {memory[-1][0]:8.3f} MiB allocated  "
                f"{memory[-1][1]:7.2f} resident  {buffers:7.2f} of session buffers",
                flush=True,
            )
        soak.close()
    kinds = ", ".join(f"{n} {kind}" for kind, n in soak.done.most_common())
    print(f"{turns[-1]} turns ({kinds}), {soak.n_tokens} tokens said")
    half = n_lines // 2
    allocated, resident = ([part[i] for part in memory[half:]] for i in (0, 1))
    forgotten = slope(turns[half:], allocated)
    torn = slope(turns[half:], resident) * (turns[-1] - turns[half]) / MIB
    print("Over the second half, by a fitted line:")
    print(
        f"{min(allocated):.3f} to {max(allocated):.3f} MiB allocated, {forgotten:+.1f} bytes a turn of {a.allocated:g}"
    )
    print(f"{min(resident):.2f} to {max(resident):.2f} MiB resident, {torn:+.2f} MiB of {a.resident:g}")
    return 1 if forgotten > a.allocated or torn > a.resident else 0


if __name__ == "__main__":
    if os.environ.get("PYTHONMALLOC") != "malloc":  # Python's own small blocks are counted too then
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONMALLOC": "malloc"})
    sys.exit(main(sys.argv[1:]))
