"""Where a step's time goes: matrix products, attention, and what is neither.

`python scripts/profile_step.py` runs the shipped pair; --target and --draft name other files (random weights will do:
no text is read). For prefill, plain decoding and trees of several budgets: a step's time, its parts by ops, and
the share outside matrix products and attention (softmax attention and Gated DeltaNet): all else on the clock, host work
and threads' waiting included. --ops lists every op. Timing itself costs some 60 ns an op.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from measuring import ROOT, Timeline, machine, say, table

import pydflash

ATTENTION = {"FLASH_ATTN_EXT", "GATED_DELTA_NET_TREE", "GATED_DELTA_NET_TREE_PERSIST"}
PRODUCTS = {"MUL_MAT"}


class OpTime(ctypes.Structure):
    """struct ggml_op_time."""

    _fields_ = [
        ("op", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("k", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("ns", ctypes.c_int64),
    ]


@dataclass(frozen=True)
class Op:
    name: str
    shape: str
    count: int
    ms: float


class OpTimes:
    """The times that the loaded CPU backend keeps by op."""

    def __init__(self) -> None:
        maps = Path("/proc/self/maps").read_text().split()
        self._cpu = ctypes.CDLL(next(word for word in maps if "libpydflash-ggml-cpu" in word))
        self._base = ctypes.CDLL(next(word for word in maps if "libpydflash-ggml-base" in word))
        for function in (self._base.ggml_op_name, self._base.ggml_type_name):
            function.restype = ctypes.c_char_p
        self._table = (OpTime * 512)()

    def during(self, run: Callable[[], None]) -> list[Op]:
        ctypes.memset(self._table, 0, ctypes.sizeof(self._table))
        self._cpu.ggml_op_times_into(self._table, len(self._table))
        try:
            run()
        finally:
            self._cpu.ggml_op_times_into(None, 0)
        return [
            Op(
                self._base.ggml_op_name(t.op).decode(),
                f"{self._base.ggml_type_name(t.type).decode()} {t.k} -> {t.m} x {t.n}",
                t.count,
                t.ns / 1e6,
            )
            for t in self._table
            if t.op
        ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", default=ROOT / "models" / "tiny-target-f16.gguf", type=Path)
    parser.add_argument("--draft", default=ROOT / "models" / "tiny-draft", type=Path)
    parser.add_argument("--threads", default=None, type=int, help="default: one a core")
    parser.add_argument("--budgets", default=[0, 7, 15, 31], type=int, nargs="+", help="nodes beside the root")
    parser.add_argument("--chain", action="store_true")
    parser.add_argument("--prefill", default=512, type=int, help="tokens")
    parser.add_argument("--steps", default=8, type=int, help="of each budget")
    parser.add_argument("--ops", action="store_true", help="every op of every part")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    n_ctx = asked.prefill + 64 + 70 * len(asked.budgets) * asked.steps
    session = pydflash.Session(asked.target, asked.draft, n_ctx=n_ctx, n_threads=asked.threads, device="cpu")
    timeline, times = Timeline(session), OpTimes()
    ids = random.Random(0).choices(range(session.n_vocab), k=asked.prefill)
    rows = []

    def show(what: str, n: int, run: Callable[[], None], parts: str = "") -> None:
        start = time.perf_counter()
        ops = times.during(run)
        ms = (time.perf_counter() - start) * 1e3
        products = sum(op.ms for op in ops if op.name in PRODUCTS)
        attention = sum(op.ms for op in ops if op.name in ATTENTION)
        other = sum(op.ms for op in ops) - products - attention
        outside = ms - products - attention
        rows.append([what, *(f"{x / n:.3f}" for x in (ms, products, attention, other, outside - other))])
        rows[-1].append(f"{outside / ms:.1%}")
        if asked.ops:
            say(f"\n{what}: {ms / n:.3f} ms {parts}")
            for op in sorted(ops, key=lambda op: -op.ms):
                say(f"  {op.ms / n:9.4f} ms {op.count / n:7.1f} x  {op.name:28} {op.shape}")

    timeline.append(ids[:65])
    show(f"prefill of {asked.prefill}, ms", 1, lambda: (timeline.append(ids), None)[1])
    for budget in asked.budgets:

        def steps(n: int, budget: int = budget) -> None:
            timeline.decode(10**6, budget=budget, chain=asked.chain, copying=False, n_steps=n)

        steps(3)  # graphs of this shape
        show(f"step of {budget + 1} nodes, ms", asked.steps, lambda: steps(asked.steps))
    print(machine())
    print(table(["", "all", "products", "attention", "other ops", "between ops", "outside"], rows))


if __name__ == "__main__":
    main()
