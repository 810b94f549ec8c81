"""Time the tree ops against upstream ggml's sequential gated_delta_net on the same chain of N tokens.

Both run in this process on the same operands, over several layers with a state each (as a model's layers have), taking
turns so that whatever else the machine does falls on both. Printed are microseconds per token and layer (the fastest
round of each) and upstream's time over ours: of the fastest rounds, and the median over rounds in brackets. With one
thread it is processor time, which other processes touch little; with more it is time on the clock, on a quiet machine.

  verify   ggml_gated_delta_net_tree alone: all that a token costs before it is accepted
  commit   ggml_gated_delta_net_tree_persist of the whole chain; upstream's op always includes its own state update
  both     upstream over verify + commit
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.ggml_ops import Ggml, Graph

HEADS = {"small": (32, 4, 8), "27B": (128, 16, 48)}  # d, Hk, Hv
STATE_BYTES = 48 << 20  # states of all layers together at most, so that the large ones do not stay in the cache


def operands(n: int, d: int, hk: int, hv: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """q, k, v, g, beta as ggml_gated_delta_net_tree takes them."""
    for heads in (hk, hk, hv):
        x = rng.standard_normal((n, heads, d))
        yield (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
    yield -rng.exponential(0.2, (n, hv)).astype(np.float32)
    yield rng.uniform(size=(n, hv)).astype(np.float32)


def build(graph: Graph, n: int, d: int, hk: int, hv: int, n_layers: int) -> dict[str, Callable[[], None]]:
    rng = np.random.default_rng(0)
    q, k, v, g, beta = (graph.tensor(x) for x in operands(n, d, hk, hv, rng))
    gates = [graph.view(x, (n, hv, 1), (4 * hv, 4), 0) for x in (g, beta)]
    chain = np.arange(-1, n - 1, dtype=np.int32)
    parent, path = graph.tensor(chain), graph.tensor(chain + 1)
    nodes: dict[str, list[int]] = {"upstream": [], "verify": [], "commit": []}
    for _ in range(n_layers):
        state = graph.tensor(rng.standard_normal((hv, d, d)).astype(np.float32))
        nodes["upstream"].append(graph.op("ggml_gated_delta_net", q, k, v, *gates, state, 1))
        nodes["verify"].append(graph.op("ggml_gated_delta_net_tree", q, k, v, g, beta, state, parent))
        # a delta of its own, so that the commit's graph does not hold the tree op
        delta = graph.tensor(rng.standard_normal((n, hv, d)).astype(np.float32))
        nodes["commit"].append(graph.op("ggml_gated_delta_net_tree_persist", state, k, delta, g, path))
    return {name: graph.prepare(*tensors) for name, tensors in nodes.items()}


def measure(runs: dict[str, Callable[[], None]], n_threads: int, seconds: float) -> dict[str, np.ndarray]:
    """Seconds per round of each run, taking turns."""
    rounds: dict[str, list[float]] = {name: [] for name in runs}
    clock = time.thread_time if n_threads == 1 else time.perf_counter
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rounds["verify"]) < 5:
        for name, run in runs.items():
            start = clock()
            run()
            rounds[name].append(clock() - start)
    return {name: np.array(times) for name, times in rounds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", choices=HEADS, nargs="+", default=list(HEADS))
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 512])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=2.0, help="measuring time for each line")
    options = parser.parse_args()

    ggml = Ggml()
    print("                         us per token and layer        upstream / ours: fastest (median)")
    print(
        f"{'heads':>6} {'threads':>7} {'N':>4} {'upstream':>9} {'verify':>8} {'commit':>8} {'verify':>16} {'both':>16}"
    )
    for heads in options.heads:
        d, hk, hv = HEADS[heads]
        for n_threads in options.threads:
            ggml.set_n_threads(n_threads)
            for n in options.nodes:
                n_layers = max(2, min(16 if n <= 64 else 4, STATE_BYTES // (4 * d * d * hv)))
                with ggml.graph() as graph:
                    times = measure(build(graph, n, d, hk, hv, n_layers), n_threads, options.seconds)
                upstream, verify, commit = (
                    times[name] / (n * n_layers) * 1e6 for name in ("upstream", "verify", "commit")
                )
                ratios = [
                    f"{upstream.min() / ours_best:7.2f} ({np.median(upstream / ours):5.2f})"
                    for ours_best, ours in ((verify.min(), verify), (verify.min() + commit.min(), verify + commit))
                ]
                fastest = f"{upstream.min():9.2f} {verify.min():8.2f} {commit.min():8.2f}"
                print(f"{heads:>6} {n_threads:7} {n:4} {fastest} {ratios[0]:>16} {ratios[1]:>16}", flush=True)


if __name__ == "__main__":
    main()
