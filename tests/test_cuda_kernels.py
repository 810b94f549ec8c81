"""The CUDA kernels, run on the CPU by tests/cuda_emulator, against float64 and against the CPU backend's ops.

The kernels, their launches and their host dispatch are the very sources that nvcc compiles. Problems and references are
those of test_tree_ops; every problem runs with the threads in forward, backward and shuffled order.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cuda_emulator
from tests.cuda_emulator import ORDERS, Emulator
from tests.ggml_ops import Ggml, Graph, TensorHead, library_folder
from tests.test_step_ops import block_mask, run_block_mask, run_top_k, run_tree_mask, top_k, tree_mask
from tests.test_tree_ops import (
    F32,
    PATHS,
    SHAPES,
    Problem,
    ancestors,
    assert_close,
    binary,
    chain,
    comb,
    convolve,
    delta_net_op,
    last_columns,
    make,
    make_conv,
    replay,
    run_conv,
    run_conv_persist,
    run_persist,
    run_tree,
    star,
)

GGML_BASE = library_folder() / "libpydflash-ggml-base.so"


class EmulatedGraph(Graph):
    """A graph whose tree ops the emulator computes, in the order they were made."""

    def __init__(self, ggml: EmulatedGgml) -> None:
        super().__init__(ggml)
        self._emulated = ggml
        self._nodes: list[int] = []

    def op(self, name: str, *operands: Any) -> int:
        node = super().op(name, *operands)
        if not name.endswith(("_out", "_delta")):  # those are views
            self._nodes.append(node)
        return node

    def supported(self, tensor: int) -> bool:
        return self._emulated.emulator.supports(tensor)

    def compute(self, *outputs: int, n_threads: int = 1) -> None:
        self.prepare(*outputs)
        for node in self._nodes:
            self._emulated.emulator.compute(node, order=self._emulated.order, seed=self._emulated.seed)


class EmulatedGgml(Ggml):
    def __init__(self, library: Path) -> None:
        super().__init__()
        self.emulator = Emulator(library)
        self.order = ORDERS[0]
        self.seed = 0

    def graph(self) -> Graph:
        return EmulatedGraph(self)

    def orders(self) -> Iterator[None]:
        """Each order once; the shuffled one with another seed every time."""
        for self.order in ORDERS:
            self.seed += 1
            yield


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    return Ggml()


@pytest.fixture(scope="session")
def library(fork: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cuda_emulator.compile_library(tmp_path_factory.mktemp("emulated"), fork, ggml_base=GGML_BASE)


@pytest.fixture(scope="session")
def cuda(library: Path) -> EmulatedGgml:
    return EmulatedGgml(library)


def check_tree(cuda: EmulatedGgml, p: Problem, tolerance: float = 3e-6) -> tuple[np.ndarray, np.ndarray]:
    """out and delta of one problem in all orders against float64; the same bits in every order."""
    expected = replay(p)
    results = [run_tree(cuda, p) for _ in cuda.orders()]
    for actual, wanted in zip(results[0], expected[:2], strict=True):
        assert_close(actual, wanted, tolerance)
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))
    return results[0]


# -- gated_delta_net_tree -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 23, 32, 33, 63, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_tree_follows_the_recurrence(cuda: EmulatedGgml, ggml: Ggml, shape: str, n: int) -> None:
    p = make(SHAPES[shape](n), d=32, hk=1, hv=2, seed=n)
    for actual, of_cpu in zip(check_tree(cuda, p), run_tree(ggml, p), strict=True):
        assert_close(actual, of_cpu.astype(float), 6e-6)


@pytest.mark.parametrize("d", [16, 32, 64, 128])
@pytest.mark.parametrize("dv", [16, 48, 128])
@pytest.mark.parametrize("n", [3, 23, 40])
def test_head_sizes(cuda: EmulatedGgml, d: int, dv: int, n: int) -> None:
    check_tree(cuda, make(comb(n), d=d, dv=dv, hk=1, hv=1, seed=d + dv))


@pytest.mark.parametrize(("hk", "hv"), [(1, 3), (2, 5), (3, 2), (16, 48)])
def test_head_layouts(cuda: EmulatedGgml, hk: int, hv: int) -> None:
    check_tree(cuda, make(comb(9), d=16, hk=hk, hv=hv))


def random_tree(n: int, rng: np.random.Generator) -> np.ndarray:
    """Mostly one tree, with a second root now and then: pads and their like."""
    return np.array([-1 if rng.random() < 0.05 else rng.integers(-1, i) if i else -1 for i in range(n)], np.int32)


@pytest.mark.parametrize("seed", range(12))
def test_random_trees(cuda: EmulatedGgml, seed: int) -> None:
    rng = np.random.default_rng(seed)
    d, dv = (int(rng.choice([16, 32, 64, 128])) for _ in range(2))
    parent = random_tree(int(rng.integers(1, 65)), rng)
    check_tree(cuda, make(parent, d=d, dv=dv, hk=1, hv=2, decay=float(rng.choice([0.01, 1.0, 10.0])), seed=seed))


@pytest.mark.parametrize("g", [0.0, -1.0, -30.0, -np.inf])
@pytest.mark.parametrize("n", [4, 23, 64, 150])
def test_constant_decay(cuda: EmulatedGgml, g: float, n: int) -> None:
    p = make(chain(n), decay=0, d=16, hk=1, hv=1)
    check_tree(cuda, replace(p, g=np.full_like(p.g, g)))


@pytest.mark.parametrize("parent", [chain(40), star(40), binary(40)], ids=["chain", "star", "binary"])
def test_decay_that_resets_some_nodes(cuda: EmulatedGgml, parent: np.ndarray) -> None:
    """g = -inf here and there: 0 and never 0 * inf."""
    p = make(parent, d=16, hk=1, hv=2)
    g = p.g.copy()
    g[::3] = -np.inf
    p = replace(p, g=g)
    check_tree(cuda, p)
    path = ancestors(parent, 39)
    assert_close(run_persist(cuda, p, path), replay(p)[2][39])


@pytest.mark.parametrize("n", [65, 128, 200])
@pytest.mark.parametrize(("d", "decay"), [(16, 30.0), (32, 0.05), (128, 0.05)])
def test_chains_longer_than_a_tree(cuda: EmulatedGgml, n: int, d: int, decay: float) -> None:
    check_tree(cuda, make(chain(n), d=d, dv=48, hk=1, hv=1, decay=decay))


@pytest.mark.parametrize(("n", "n_real"), [(128, 65), (128, 100), (192, 64), (200, 1)])
def test_pads_end_a_long_chain(cuda: EmulatedGgml, n: int, n_real: int) -> None:
    p = make(np.where(np.arange(n) < n_real, chain(n), -1).astype(np.int32), d=16, hk=1, hv=1)
    expected = replay(p.nodes(np.arange(n_real)))
    for _ in cuda.orders():
        for actual, wanted in zip(run_tree(cuda, p), expected[:2], strict=True):
            assert np.isfinite(actual).all()
            assert_close(actual[:n_real], wanted)
        path = [*range(n_real), *[-1] * (n - n_real)]
        assert_close(run_persist(cuda, p, path), expected[2][-1])


def test_slices_of_one_matrix(cuda: EmulatedGgml) -> None:
    """q, k, v as slices of the convolution's output, g and beta as columns of wider matrices, as a model has them."""
    p = make(binary(37), d=32, dv=16, hk=2, hv=6)
    n, hk, d = p.k.shape
    hv, dv = p.v.shape[1:]
    whole = np.concatenate([p.q.reshape(n, -1), p.k.reshape(n, -1), p.v.reshape(n, -1), np.full((n, 9), np.nan)], 1)
    gates = np.concatenate([p.g, p.beta], 1)
    row, wide = whole.shape[1] * 4, 2 * hv * 4
    for _ in cuda.orders():
        with cuda.graph() as graph:
            matrix, gate = graph.tensor(whole.astype(F32)), graph.tensor(gates)
            operands = {
                "q": graph.view(matrix, (n, hk, d), (row, d * 4), 0),
                "k": graph.view(matrix, (n, hk, d), (row, d * 4), hk * d * 4),
                "v": graph.view(matrix, (n, hv, dv), (row, dv * 4), 2 * hk * d * 4),
                "g": graph.view(gate, (n, hv), (wide,), 0),
                "beta": graph.view(gate, (n, hv), (wide,), hv * 4),
            }
            result, tensors = delta_net_op(graph, p, operands)
            out, delta = (graph.op(f"ggml_gated_delta_net_tree_{name}", result) for name in ("out", "delta"))
            path = graph.tensor(np.array(ancestors(p.parent, n - 1), np.int32))
            persist = (tensors["state"], tensors["k"], delta, tensors["g"], path)
            state = graph.op("ggml_gated_delta_net_tree_persist", *persist)
            graph.compute(state)
            expected = replay(p)
            assert_close(graph.read(out, n, hv, dv), expected[0])
            assert_close(graph.read(delta, n, hv, dv), expected[1])
            assert_close(graph.read(state, *p.state.shape), expected[2][-1])


def test_impossible_parents_read_as_the_committed_state(cuda: EmulatedGgml) -> None:
    p = make(chain(8))
    wrong = replace(p, parent=np.array([0, 0, 5, 2, 2**31 - 1, -7, 5, -(2**31)], np.int32))
    right = replace(p, parent=np.array([-1, 0, -1, 2, -1, -1, 5, -1], np.int32))
    for a, b in zip(run_tree(cuda, wrong), run_tree(cuda, right), strict=True):
        assert np.array_equal(a, b)


def test_branches_do_not_see_each_other(cuda: EmulatedGgml) -> None:
    """Other operands at one node change what descends from it, and not one bit elsewhere."""
    p, other = make(binary(40), hv=2, d=16), make(binary(40), hv=2, d=16, seed=1)
    node = 4
    changed = {name: getattr(p, name).copy() for name in ("q", "k", "v", "g", "beta")}
    for name, array in changed.items():
        array[node] = getattr(other, name)[node]
    outside = [i for i in range(p.n) if node not in ancestors(p.parent, i)]
    for a, b in zip(run_tree(cuda, p), run_tree(cuda, replace(p, **changed)), strict=True):
        assert np.array_equal(a[outside], b[outside])
        assert not np.array_equal(a, b)


# -- gated_delta_net_tree_persist ---------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [16, 32, 64, 128])
@pytest.mark.parametrize("dv", [16, 48, 128])
@pytest.mark.parametrize("path", [[0], [0, 1], [0, 2, 4, 6, 8, 10, 11, -1, -1]])
def test_persist(cuda: EmulatedGgml, ggml: Ggml, d: int, dv: int, path: list[int]) -> None:
    p = make(comb(12), d=d, dv=dv, hk=2, hv=3)
    expected = replay(p)[2][max(path)]
    states = [run_persist(cuda, p, path) for _ in cuda.orders()]
    assert_close(states[0], expected)
    assert_close(states[0], run_persist(ggml, p, path).astype(float), 6e-6)
    assert all(np.array_equal(states[0], other) for other in states[1:])


@pytest.mark.parametrize("decay", [0.0, 0.05, 30.0])
def test_persist_of_long_chains(cuda: EmulatedGgml, decay: float) -> None:
    p = make(chain(200), decay=decay, d=16, hk=2, hv=3)
    expected = replay(p)[2]
    for length in (200, 64):
        assert_close(run_persist(cuda, p, [*range(length), *[-1] * (200 - length)]), expected[length - 1])


def test_persist_keeps_digits_after_strong_decay(cuda: EmulatedGgml) -> None:
    p = make(chain(64), d=16)
    p = replace(p, g=np.where(np.arange(64)[:, None] < 60, -30.0, -0.01).astype(F32) * np.ones_like(p.g))
    check_tree(cuda, p)
    assert_close(run_persist(cuda, p, list(range(64))), replay(p)[2][-1], tolerance=1e-6)


@pytest.mark.parametrize("path", [[-1], [-1, -1, -1], [99, -5]])
def test_empty_path_keeps_the_state(cuda: EmulatedGgml, path: list[int]) -> None:
    p = make(chain(5), d=16)
    p.state[0, 0, :2] = -0.0
    assert run_persist(cuda, p, path).tobytes() == p.state.tobytes()


# -- ssm_conv_tree ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_taps", [2, 3, 4, 5, 16])
@pytest.mark.parametrize(("channels", "n"), [(1, 1), (63, 8), (128, 9), (300, 23), (48, 200)])
def test_convolution(cuda: EmulatedGgml, ggml: Ggml, n_taps: int, channels: int, n: int) -> None:
    rng = np.random.default_rng(n)
    operands = make_conv(random_tree(n, rng), channels, n_taps, n)
    parent = random_tree(n, rng)
    expected = convolve(*operands, parent)
    for _ in cuda.orders():
        actual = run_conv(cuda, *operands, parent)
        assert_close(actual, expected)
        assert_close(actual, run_conv(ggml, *operands, parent).astype(float))


def test_convolution_of_slices(cuda: EmulatedGgml) -> None:
    parent = comb(20)
    state, x, kernel = make_conv(parent, 80, 4, 0)
    around = [np.full((20, n), np.nan, F32) for n in (7, 5)]
    with cuda.graph() as graph:
        wide = graph.tensor(np.concatenate([around[0], x, around[1]], 1))
        past = graph.tensor(np.concatenate([around[0][:3], state, around[1][:3]], 1))
        operands = [graph.view(t, a.shape, (92 * 4,), 7 * 4) for t, a in ((past, state), (wide, x))]
        result = graph.op("ggml_ssm_conv_tree", *operands, graph.tensor(kernel), graph.tensor(parent))
        graph.compute(result)
        assert_close(graph.read(result, *x.shape), convolve(state, x, kernel, parent))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n_taps", [2, 4, 16])
@pytest.mark.parametrize("channels", [1, 128, 300])
def test_the_last_columns_stay(cuda: EmulatedGgml, path: list[int], n_taps: int, channels: int) -> None:
    state, x, _ = make_conv(chain(20), channels, n_taps, channels)
    for _ in cuda.orders():
        assert np.array_equal(run_conv_persist(cuda, state, x, path), last_columns(state, x, path))


# -- tree_mask and block_mask -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "n_kv"), [(0, 1), (0, 64), (7, 13), (200, 264), (200, 256), (2300, 2304), (2500, 2304)])
@pytest.mark.parametrize("n_nodes", [1, 23, 70])
def test_tree_mask(cuda: EmulatedGgml, n: int, n_kv: int, n_nodes: int) -> None:
    parent = random_tree(n_nodes, np.random.default_rng(n_nodes))
    parent[n_nodes // 2 :: 9] = [[2**31 - 1, -7, -(2**31)][i % 3] for i in range(len(parent[n_nodes // 2 :: 9]))]
    for _ in cuda.orders():
        assert np.array_equal(run_tree_mask(cuda, parent, n, n_kv), tree_mask(parent, n, n_kv))


@pytest.mark.parametrize("n", [-(2**31), -1, 2**31 - 1])
def test_tree_mask_of_an_impossible_count(cuda: EmulatedGgml, n: int) -> None:
    assert np.array_equal(run_tree_mask(cuda, comb(9), n, 64), tree_mask(comb(9), max(min(n, 64), 0), 64))


@pytest.mark.parametrize("n", [-3, 0, 1, 15, 40, 41, 1000])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 1, 9, 45])
@pytest.mark.parametrize("n_kv", [16, 64, 75])
def test_block_mask(cuda: EmulatedGgml, n: int, causal: bool, window: int, n_kv: int) -> None:
    arguments = (n, n_kv, 16, 40, window, causal)
    next(cuda.orders())
    assert np.array_equal(run_block_mask(cuda, *arguments), block_mask(*arguments))


# -- top_k_logp ---------------------------------------------------------------------------------------------------

SLICE = 4096  # logits a block works off


def check_top_k(cuda: EmulatedGgml, logits: np.ndarray, k: int) -> None:
    """Ids as float64 has them; log-probabilities of sums in f32; the same bits in every order."""
    results = [run_top_k(cuda, logits, k) for _ in cuda.orders()]
    for ids, logp in results[1:]:
        assert np.array_equal(ids, results[0][0])
        assert logp.tobytes() == results[0][1].tobytes()
    for row, ids, logp in zip(logits, *results[0], strict=True):
        expected_ids, expected = top_k(row, k)
        assert np.array_equal(ids, expected_ids)
        masked = np.isneginf(expected)
        assert np.array_equal(np.isneginf(logp), masked)
        logp, expected = logp[~masked], expected[~masked]
        assert (np.abs(logp - expected) <= 1e-6 * np.maximum(1, np.abs(expected))).all()


@pytest.mark.parametrize("n_vocab", [1, 2, 64, 65, 257, SLICE - 1, SLICE, SLICE + 1, 5 * SLICE + 70])
@pytest.mark.parametrize("k", [1, 8, 64])
def test_top_k(cuda: EmulatedGgml, n_vocab: int, k: int) -> None:
    logits = np.random.default_rng(n_vocab + k).normal(0, 4, (3, n_vocab)).astype(F32)
    check_top_k(cuda, logits, min(k, n_vocab))


def test_top_k_of_a_real_vocabulary(cuda: EmulatedGgml) -> None:
    check_top_k(cuda, np.random.default_rng(0).normal(0, 4, (1, 248320)).astype(F32), 16)


def test_top_k_in_three_rounds(cuda: EmulatedGgml) -> None:
    check_top_k(cuda, np.random.default_rng(0).normal(0, 4, (1, 65 * SLICE)).astype(F32), 64)


@pytest.mark.parametrize("seed", range(10))
def test_top_k_of_any_rows(cuda: EmulatedGgml, ggml: Ggml, seed: int) -> None:
    """Few distinct values, so that nearly everything ties, masked tokens, far-off, tiny and wrong values."""
    rng = np.random.default_rng(seed)
    n_vocab, k = int(rng.choice([5, 300, SLICE + 3])), int(rng.integers(1, 6))
    values = rng.normal(0, 1, int(rng.choice([1, 2, 5, 1000]))) * rng.choice([0.0, 1e-42, 1.0, 30.0, 1e38])
    logits = rng.choice(np.clip(values, -3.4e38, 3.4e38).astype(F32), (6, n_vocab))
    for row, odd in enumerate([-np.inf, -0.0, np.inf, np.nan, -np.nan]):
        logits[row, rng.random(n_vocab) < rng.choice([0.001, 0.5, 1.0])] = odd
    check_top_k(cuda, logits, k)
    assert np.array_equal(run_top_k(cuda, logits, k)[0], run_top_k(ggml, logits, k)[0])


def test_top_k_of_masked_tokens(cuda: EmulatedGgml) -> None:
    logits = np.full((4, SLICE + 100), -np.inf, F32)
    logits[1, SLICE + 7] = -3.0  # all of a slice masked, one token left
    logits[2, [9, 3, SLICE + 1]] = 1.0
    logits[3, :] = 0.0
    logits[3, 1] = -0.0  # equal to the others
    check_top_k(cuda, logits, 6)


@pytest.mark.parametrize("falling", [False, True])
def test_top_k_of_rows_that_defeat_the_bound(cuda: EmulatedGgml, falling: bool) -> None:
    """The large logits all in few groups of threads: nearly all of a slice is gathered."""
    logits = np.arange(SLICE, dtype=F32).reshape(256, 16).T.reshape(1, -1)
    check_top_k(cuda, logits[:, ::-1] if falling else logits, 64)


def test_top_k_stays_finite(cuda: EmulatedGgml) -> None:
    _, logp = run_top_k(cuda, np.array([[3.4e38, -3.4e38]], F32), 2)
    assert logp.tolist() == [[0.0, float(np.finfo(F32).min)]]


# -- tests of the tests: faults put into the kernels have to be found ---------------------------------------------


def check_conv(cuda: EmulatedGgml) -> None:
    operands = make_conv(comb(9), 130, 4, 0)
    for _ in cuda.orders():
        assert_close(run_conv(cuda, *operands, comb(9)), convolve(*operands, comb(9)))
        state, x, _ = operands
        assert np.array_equal(run_conv_persist(cuda, state, x, [0, 2, 4]), last_columns(state, x, [0, 2, 4]))


def check_persist(cuda: EmulatedGgml) -> None:
    p = make(comb(9), d=32, dv=48, hk=1, hv=2)
    for _ in cuda.orders():
        assert_close(run_persist(cuda, p, [0, 2, 4]), replay(p)[2][4])


def check_mask(cuda: EmulatedGgml) -> None:
    for _ in cuda.orders():
        assert np.array_equal(run_tree_mask(cuda, comb(9), 7, 24), tree_mask(comb(9), 7, 24))


def check_logits(cuda: EmulatedGgml) -> None:
    check_top_k(cuda, np.random.default_rng(0).normal(0, 4, (2, SLICE + 900)).astype(F32), 8)


def check_chain(cuda: EmulatedGgml) -> None:
    check_tree(cuda, make(chain(150), d=32, dv=48, hk=1, hv=1))


CHECKS: dict[str, Callable[[EmulatedGgml], object]] = {
    "tree-conv.cu": check_conv,
    "tree-delta-net.cu": check_chain,
    "tree-mask.cu": check_mask,
    "tree-persist.cu": check_persist,
    "tree-top-k.cu": check_logits,
}
KERNELS = {name: cuda_emulator.GGML / "src" / "ggml-cuda" / name for name in CHECKS}
BARRIERS = [
    (name, line)
    for name, path in KERNELS.items()
    for line, text in enumerate(path.read_text().splitlines(), 1)
    if "__syncthreads" in text and "for speed alone" not in text
]


@pytest.mark.parametrize(("name", "line"), BARRIERS, ids=str)
def test_every_barrier_is_missed(cuda: EmulatedGgml, name: str, line: int) -> None:
    CHECKS[name](cuda)
    cuda.emulator.drop_barrier(f"{name}.cpp", line)
    try:
        with pytest.raises((AssertionError, RuntimeError)):
            CHECKS[name](cuda)
    finally:
        cuda.emulator.drop_barrier("", 0)


FAULTS = {  # kernel: what stands there, what is put in its place, what is said of it
    "tree-conv.cu": ("if (c >= a.channels) {", "if (c >= a.channels || c == 77) {", "isfinite"),
    "tree-mask.cu": ("if (column >= n_kv) {", "if (column >= n_kv + width) {", "wrote beside its result"),
    "tree-persist.cu": (
        "state[(int64_t) c * d + s * across] = w",
        "state[(int64_t) c * d + s * across + 1] = w",
        "assert|wrote",
    ),
    "tree-top-k.cu": (
        "maximum = larger(maximum, __shfl_xor",
        "if (tid % 32 != 5) maximum = larger(maximum, __shfl_xor",
        r"deadlock in block(.|\n)*waits for its warp at tree-top-k\.cu\.cpp:\d+, mask ffffffff",
    ),
}


@pytest.fixture(scope="session")
def faulty(fork: Path, library: Path, tmp_path_factory: pytest.TempPathFactory) -> EmulatedGgml:
    def change(name: str, text: str) -> str:
        if name in FAULTS:
            right, wrong, _ = FAULTS[name]
            assert text.count(right) == 1, f"{name} no longer has the line that this test breaks"
            text = text.replace(right, wrong)
        return text

    folder = tmp_path_factory.mktemp("faulty")
    return EmulatedGgml(
        cuda_emulator.compile_library(folder, fork, ggml_base=GGML_BASE, change=change, unchanged=library.parent)
    )


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(faulty: EmulatedGgml, name: str) -> None:
    with pytest.raises((AssertionError, RuntimeError), match=FAULTS[name][2]):
        CHECKS[name](faulty)


# -- once under the address and undefined-behaviour sanitizers ----------------------------------------------------


def sanitized(library: str, n_missing: int) -> None:
    """Everything once, in the shuffled order; `n_missing` entries of a parent tensor are not there."""
    cuda = EmulatedGgml(Path(library))
    cuda.order, cuda.seed = "shuffled", 1
    cuda.orders = lambda: iter([None])  # type: ignore[method-assign]
    for check in CHECKS.values():
        check(cuda)
    for n, dv in ((5, 16), (23, 48), (64, 32)):
        check_tree(cuda, make(binary(n), d=32, dv=dv, hk=2, hv=3))
    test_slices_of_one_matrix(cuda)
    test_convolution_of_slices(cuda)
    assert np.array_equal(run_block_mask(cuda, 50, 75, 16, 40, 9, True), block_mask(50, 75, 16, 40, 9, True))
    if n_missing:
        with cuda.graph() as graph:
            operands = [graph.tensor(a) for a in make_conv(comb(9), 130, 4, 0)]
            parent = graph.tensor(comb(9))
            result = graph.op("ggml_ssm_conv_tree", *operands, parent)
            graph.prepare(result)
            ctypes.cast(parent, ctypes.POINTER(TensorHead)).contents.ne[0] -= n_missing
            cuda.emulator.compute(result)


def test_sanitizers_find_nothing(fork: Path, tmp_path: Path) -> None:
    """And would: a kernel that reads beyond an operand is stopped."""

    def change(name: str, text: str) -> str:  # one head size takes a quarter of the time to compile
        return re.sub(r"launch_delta_net_tree<\d+>\(a,", "launch_delta_net_tree<32>(a,", text)

    flags = cuda_emulator.SANITIZE
    library = cuda_emulator.compile_library(tmp_path, fork, ggml_base=GGML_BASE, change=change, flags=flags)
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "GGML_NO_BACKTRACE": "1"}

    def run(n_missing: int) -> subprocess.CompletedProcess[str]:
        script = f"from tests.test_cuda_kernels import sanitized; sanitized({str(library)!r}, {n_missing})"
        command = [sys.executable, "-c", script]
        root = cuda_emulator.HERE.parents[1]
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)

    clean, broken = run(0), run(1)
    assert clean.returncode == 0, clean.stderr
    assert "runtime error" not in clean.stderr
    assert broken.returncode != 0
    assert "heap-buffer-overflow" in broken.stderr
    assert "conv_tree" in broken.stderr
