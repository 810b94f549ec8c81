"""Time attention on the CPU by KV type: one op over a cache of n_kv rows, for plain steps, trees and pieces of prompts.

All types take turns in one process. Printed is processor time of one thread in ms, the fastest round of each, and of
the quantised types what they take over F16.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.ggml_ops import Ggml, packed_cache

HEADS = {"small": (64, 4, 2), "27B": (256, 24, 4)}  # d, query heads, KV heads
TYPES = (Type.F16, Type.Q8_0, Type.Q4_0)


def measure(ggml: Ggml, heads: str, n: int, n_kv: int, rounds: int) -> dict[Type, float]:
    """Seconds of the fastest round of each type."""
    d, n_head, n_head_kv = HEADS[heads]
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2, n_kv, n_head_kv, d), np.float32)
    best = dict.fromkeys(TYPES, float("inf"))
    with ggml.graph() as graph:
        q = graph.tensor(rng.standard_normal((n_head, n, d), np.float32))
        mask = graph.tensor(np.zeros((n, n_kv), np.float16))
        outs = []
        for kind in TYPES:
            (k, _), (v, _) = (packed_cache(graph, x, kind) for x in values)
            outs.append(graph.op("ggml_flash_attn_ext", q, k, v, mask, d**-0.5, 0.0, 0.0))
        runs = [graph.prepare(out) for out in outs]
        for _ in range(rounds):
            for kind, run in zip(TYPES, runs, strict=True):
                start = time.thread_time()
                run()
                best[kind] = min(best[kind], time.thread_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", choices=HEADS, nargs="+", default=["small"])
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 17, 64, 512])
    parser.add_argument("--n-kv", type=int, nargs="+", default=[4096, 12288, 32768])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    ggml = Ggml()
    ggml.set_n_threads(1)
    print(f"{'heads':>6} {'n_kv':>7} {'queries':>7} " + " ".join(f"{kind.name + ' ms':>16}" for kind in TYPES))
    for heads in options.heads:
        for n_kv in options.n_kv:
            for n in options.queries:
                best = measure(ggml, heads, n, n_kv, options.rounds)
                shown = [f"{ms * 1e3:8.2f} ({ms / best[Type.F16]:5.2f})" for ms in best.values()]
                print(f"{heads:>6} {n_kv:7} {n:7} " + " ".join(f"{text:>16}" for text in shown), flush=True)


if __name__ == "__main__":
    main()
