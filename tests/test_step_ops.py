"""Attention masks and likeliest tokens on the CPU backend against plain numpy, written from their definitions.

Log-probabilities are compared with float64 ones; masks and ids have to be equal.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ggml_ops import Ggml, assert_builder_aborts

TOP_K_MAX = 64  # GGML_TOP_K_MAX
BLOCK = 16384  # logits a thread works off at a time on the CPU: rows around it take another path
F32 = np.float32

examples = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def ggml(device: str) -> Ggml:
    return Ggml(device=device)


# -- definitions --------------------------------------------------------------------------------------------------


def tree_mask(parent: np.ndarray, n: int, n_kv: int) -> np.ndarray:
    """[N, n_kv], True where open. Bad parents read as -1, n as the nearest number of 0 .. n_kv."""
    n = min(max(n, 0), n_kv)
    mask = np.zeros((len(parent), n_kv + len(parent)), bool)
    mask[:, :n] = True
    for i in range(len(parent)):
        j = i
        while j >= 0:
            mask[i, n + j] = True
            j = int(parent[j]) if 0 <= parent[j] < j else -1
    return mask[:, :n_kv]


def block_mask(n: int, n_kv: int, block: int, n_ring: int, window: int, causal: bool) -> np.ndarray:
    """[block, n_kv], True where open."""
    n = max(n, 0)
    mask = np.zeros((block, n_kv), bool)
    position_of = {p % n_ring: p for p in range(n)}  # the largest wins
    for s in range(block):
        for c in range(block):
            seen = c <= s if causal else True
            near = window == 0 or (s - c < window and (causal or c - s < window))
            mask[s, c] = seen and near
        for r, p in position_of.items():
            if block + r < n_kv:
                mask[s, block + r] = window == 0 or n + s - p < window
    return mask


def top_k(row: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """ids [k] and log-probabilities [k] of one row, in float64."""
    row = row.astype(float)
    if np.isnan(row).any() or (row == np.inf).any() or not np.isfinite(row).any():
        return np.full(k, -1), np.full(k, -np.inf)
    with np.errstate(divide="ignore"):
        logp = row - row.max() - np.log(np.exp(row - row.max()).sum())
    ids = np.lexsort((np.arange(len(row)), -row))[:k]
    return ids, logp[ids]


# -- the ops, run -------------------------------------------------------------------------------------------------


def run_mask(ggml: Ggml, op: str, operands: list[np.ndarray], *arguments: object, n_threads: int) -> np.ndarray:
    with ggml.graph() as graph:
        result = graph.op(op, *(graph.tensor(a) for a in operands), *arguments)
        assert graph.supported(result)
        graph.compute(result, n_threads=n_threads)
        mask = graph.read(result, -1, int(arguments[0]))  # type: ignore[call-overload]
    assert mask.dtype == np.float16
    assert ((mask == 0) | (mask == -np.inf)).all()
    assert not np.signbit(mask[mask == 0]).any()
    opened: np.ndarray = mask == 0
    return opened


def run_tree_mask(ggml: Ggml, parent: np.ndarray, n: int, n_kv: int, *, n_threads: int = 1) -> np.ndarray:
    return run_mask(ggml, "ggml_tree_mask", [parent, np.array([n], np.int32)], n_kv, n_threads=n_threads)


def run_block_mask(
    ggml: Ggml, n: int, n_kv: int, block: int, n_ring: int, window: int, causal: bool, *, n_threads: int = 1
) -> np.ndarray:
    arguments = (n_kv, block, n_ring, window, causal)
    return run_mask(ggml, "ggml_block_mask", [np.array([n], np.int32)], *arguments, n_threads=n_threads)


def run_top_k(ggml: Ggml, logits: np.ndarray, k: int, *, n_threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """ids and log-probabilities, each [N, k]."""
    with ggml.graph() as graph:
        result = graph.op("ggml_top_k_logp", graph.tensor(logits), k)
        assert graph.supported(result)
        graph.compute(result, n_threads=n_threads)
        both = graph.read(result, len(logits), 2 * k)
    return both[:, :k], both[:, k:].view(F32)


def check_top_k(ggml: Ggml, logits: np.ndarray, k: int) -> None:
    ids, logp = run_top_k(ggml, logits, k)
    for n_threads in (2, 3, 7):
        again = run_top_k(ggml, logits, k, n_threads=n_threads)
        assert np.array_equal(ids, again[0])
        assert np.array_equal(logp.view(np.int32), again[1].view(np.int32))
    for i, row in enumerate(logits):
        expected_ids, expected = top_k(row, k)
        assert np.array_equal(ids[i], expected_ids)
        masked = np.isneginf(expected)
        assert np.array_equal(np.isneginf(logp[i]), masked)
        size = np.maximum(1, np.abs(expected[~masked]))
        assert (np.abs(logp[i][~masked] - expected[~masked]) <= 4e-7 * size).all()


# -- tree_mask ----------------------------------------------------------------------------------------------------


@st.composite
def parents(draw: st.DrawFn) -> np.ndarray:
    """Trees with pads, forests, and now and then a parent that makes no sense."""
    n = draw(st.integers(1, 70))
    odd = st.sampled_from([-(2**31), -7, 2**31 - 1, 69])
    return np.array(
        [draw(st.one_of(st.integers(-1, max(i - 1, -1)), odd if i % 9 == 8 else st.just(i - 1))) for i in range(n)],
        np.int32,
    )


@examples
@given(parents(), st.integers(0, 600), st.integers(0, 300))
def test_tree_mask(ggml: Ggml, parent: np.ndarray, n: int, more: int) -> None:
    n_kv = n + len(parent) + more
    expected = tree_mask(parent, n, n_kv)
    for n_threads in (1, 2, 5):
        assert np.array_equal(run_tree_mask(ggml, parent, n, n_kv, n_threads=n_threads), expected)


def test_tree_mask_of_a_chain_is_causal(ggml: Ggml) -> None:
    opened = run_tree_mask(ggml, np.arange(-1, 99, dtype=np.int32), 28, 256)
    assert np.array_equal(opened, np.arange(256) <= 28 + np.arange(100)[:, None])


@pytest.mark.parametrize("n", [-(2**31), -1, 250, 256, 300, 2**31 - 1])
def test_tree_mask_stays_inside_its_columns(ggml: Ggml, n: int) -> None:
    parent = np.array([-1, 0, 0, 1, -1, -1], np.int32)
    assert np.array_equal(run_tree_mask(ggml, parent, n, 256), tree_mask(parent, n, 256))


# -- block_mask ---------------------------------------------------------------------------------------------------


@examples
@given(st.data())
def test_block_mask(ggml: Ggml, data: st.DataObject) -> None:
    block, n_ring = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 80))
    n_kv = data.draw(st.integers(block, block + n_ring + 40))
    n = data.draw(st.one_of(st.integers(0, 3 * n_ring), st.integers(-2, 2)))
    window, causal = data.draw(st.one_of(st.just(0), st.integers(1, 100))), data.draw(st.booleans())
    expected = block_mask(n, n_kv, block, n_ring, window, causal)
    for n_threads in (1, 2, 5):
        opened = run_block_mask(ggml, n, n_kv, block, n_ring, window, causal, n_threads=n_threads)
        assert np.array_equal(opened, expected)


def test_block_mask_before_any_token_is_the_block(ggml: Ggml) -> None:
    opened = run_block_mask(ggml, 0, 256, 16, 64, 0, False)
    assert np.array_equal(opened, np.broadcast_to(np.arange(256) < 16, (16, 256)))


def test_block_mask_of_a_wrapped_ring_opens_all_of_it(ggml: Ggml) -> None:
    opened = run_block_mask(ggml, 1000, 256, 16, 200, 0, True)
    assert np.array_equal(opened[:, 16:], np.broadcast_to(np.arange(240) < 200, (16, 240)))


# -- top_k_logp ---------------------------------------------------------------------------------------------------

SIZES = [1, 2, 63, 64, 65, 255, 257, 1000, 4097, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 70]


@pytest.mark.parametrize("n_vocab", SIZES)
@pytest.mark.parametrize("k", [1, 2, 22, 64])
def test_top_k(ggml: Ggml, n_vocab: int, k: int) -> None:
    logits = np.random.default_rng(n_vocab + k).normal(0, 4, (3, n_vocab)).astype(F32)
    check_top_k(ggml, logits, min(k, n_vocab))


@examples
@given(st.data())
def test_any_rows(ggml: Ggml, data: st.DataObject) -> None:
    """Few distinct values, so that nearly everything ties, masked tokens, far-off and wrong values."""
    n_vocab = data.draw(st.sampled_from([1, 5, 64, 300, 2000, BLOCK + 3]))
    k = data.draw(st.integers(1, min(TOP_K_MAX, n_vocab)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    n_values = data.draw(st.sampled_from([1, 2, 5, 1000]))
    scale = data.draw(st.sampled_from([0.0, 1.0, 30.0, 3e38]))
    with np.errstate(over="ignore"):
        values = np.clip(rng.normal(0, 1, n_values) * scale, -3.4e38, 3.4e38).astype(F32)
    logits = rng.choice(values, (data.draw(st.integers(1, 9)), n_vocab)).astype(F32)
    for odd in data.draw(st.lists(st.sampled_from([-np.inf, -np.inf, -0.0, 0.0, np.inf, np.nan, -np.nan]), max_size=3)):
        row = data.draw(st.integers(0, len(logits) - 1))
        some = rng.random(n_vocab) < data.draw(st.sampled_from([0.001, 0.5, 1.0]))
        logits[row, some] = odd
    check_top_k(ggml, logits, k)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 255, BLOCK, 2 * BLOCK + 9])
def test_a_wrong_row_has_no_ids_and_spoils_no_other(ggml: Ggml, bad: float, at: int) -> None:
    logits = np.random.default_rng(0).normal(0, 4, (3, 2 * BLOCK + 10)).astype(F32)
    logits[1, at] = bad
    ids, logp = run_top_k(ggml, logits, 5)
    assert (ids[1] == -1).all()
    assert np.isneginf(logp[1]).all()
    check_top_k(ggml, logits, 5)


def test_rows_of_masked_tokens(ggml: Ggml) -> None:
    logits = np.full((4, BLOCK + 100), -np.inf, F32)
    logits[1, BLOCK + 7] = -3.0  # all of a block masked, one token left
    logits[2, [9, 3, BLOCK + 1]] = 1.0
    logits[3, :] = 0.0
    logits[3, 1] = -0.0  # equal to the others
    check_top_k(ggml, logits, 6)
    ids, logp = run_top_k(ggml, logits, 6)
    assert ids[0].tolist() == [-1] * 6
    assert ids[1].tolist() == [BLOCK + 7, 0, 1, 2, 3, 4]
    assert logp[1, 0] == 0
    assert ids[2].tolist() == [3, 9, BLOCK + 1, 0, 1, 2]
    assert ids[3].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_finite_log_probability_stays_finite(ggml: Ggml) -> None:
    logits = np.array([[3.4e38, -3.4e38]], F32)
    _, logp = run_top_k(ggml, logits, 2)
    assert logp.tolist() == [[0.0, float(np.finfo(F32).min)]]


def test_a_view_of_rows(ggml: Ggml) -> None:
    logits = np.random.default_rng(3).normal(0, 4, (5, 700)).astype(F32)
    with ggml.graph() as graph:
        some = graph.view(graph.tensor(logits), (2, 700), (700 * 4,), 3 * 700 * 4)
        result = graph.op("ggml_top_k_logp", some, 9)
        graph.compute(result, n_threads=2)
        ids = graph.read(result, 2, 18)[:, :9]
    assert np.array_equal(ids, [top_k(row, 9)[0] for row in logits[3:]])


# -- what the builders refuse -------------------------------------------------------------------------------------

BAD_CALLS = {
    "k of 0": "g.op('ggml_top_k_logp', g.tensor(np.zeros((1, 99), F32)), 0)",
    "k above 64": "g.op('ggml_top_k_logp', g.tensor(np.zeros((1, 99), F32)), 65)",
    "k above n_vocab": "g.op('ggml_top_k_logp', g.tensor(np.zeros((1, 9), F32)), 10)",
    "logits of half precision": "g.op('ggml_top_k_logp', g.tensor(np.zeros((1, 99), np.float16)), 2)",
    "parents of floats": "g.op('ggml_tree_mask', g.tensor(np.zeros(3, F32)), g.tensor(np.zeros(1, np.int32)), 9)",
    "two counts": "g.op('ggml_tree_mask', *[g.tensor(np.zeros(2, np.int32)) for _ in range(2)], 9)",
    "a block wider than its mask": "g.op('ggml_block_mask', g.tensor(np.zeros(1, np.int32)), 9, 10, 5, 0, False)",
    "no ring": "g.op('ggml_block_mask', g.tensor(np.zeros(1, np.int32)), 9, 5, 0, 0, False)",
    "a negative window": "g.op('ggml_block_mask', g.tensor(np.zeros(1, np.int32)), 9, 5, 4, -1, False)",
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_builder_refuses(call: str) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.test_step_ops import *;"
        f"g = Ggml(Path(sys.argv[1])).graph(); {call}"
    )
    assert_builder_aborts(script)
