"""The tree ops on the CPU backend against float64 replays of their definitions.

The references keep one state per node and follow the recurrence literally; the ops never form such a state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ggml_ops import Ggml, Graph, assert_builder_aborts

MAX_NODES = 64  # GGML_TREE_MAX_NODES
F32 = np.float32

examples = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def ggml(device: str) -> Ggml:
    return Ggml(device=device)


# -- problems -----------------------------------------------------------------------------------------------------


def chain(n: int) -> np.ndarray:
    return np.arange(-1, n - 1, dtype=np.int32)


def star(n: int) -> np.ndarray:
    return np.minimum(np.arange(n) - 1, 0).astype(np.int32)


def comb(n: int) -> np.ndarray:
    """A spine of even nodes, each with one tooth."""
    return np.array([i - 1 if i % 2 else i - 2 if i else -1 for i in range(n)], np.int32)


def binary(n: int) -> np.ndarray:
    return np.array([(i + 1) // 2 - 1 for i in range(n)], np.int32)


def forest(n: int) -> np.ndarray:
    return np.full(n, -1, np.int32)


def ancestors(parent: np.ndarray, node: int) -> list[int]:
    """The path from the root down to node, node included."""
    path = []
    while node >= 0:
        path.append(node)
        node = int(parent[node])
    return path[::-1]


@dataclass(frozen=True)
class Problem:
    """Operands of ggml_gated_delta_net_tree in numpy order."""

    q: np.ndarray  # [N, Hk, d]
    k: np.ndarray  # [N, Hk, d]
    v: np.ndarray  # [N, Hv, dv]
    g: np.ndarray  # [N, Hv]
    beta: np.ndarray  # [N, Hv]
    state: np.ndarray  # [Hv, dv, d]
    parent: np.ndarray  # [N]

    @property
    def n(self) -> int:
        return len(self.parent)

    def nodes(self, index: np.ndarray) -> Problem:
        """The same operands with nodes picked by index; parents are the caller's business."""
        return replace(self, **{name: getattr(self, name)[index] for name in ("q", "k", "v", "g", "beta", "parent")})


def make(
    parent: np.ndarray,
    *,
    d: int = 32,
    dv: int | None = None,
    hk: int = 2,
    hv: int = 4,
    decay: float = 0.3,
    seed: int = 0,
) -> Problem:
    """Operands as a model makes them: unit q and k, beta in (0, 1), g <= 0 with the given mean, never below -30."""
    rng = np.random.default_rng(seed)
    n, dv = len(parent), dv or d
    q, k = (rng.standard_normal((n, hk, d)) for _ in range(2))
    return Problem(
        q=(q / np.linalg.norm(q, axis=-1, keepdims=True)).astype(F32),
        k=(k / np.linalg.norm(k, axis=-1, keepdims=True)).astype(F32),
        v=rng.standard_normal((n, hv, dv)).astype(F32),
        g=np.maximum(-decay * rng.exponential(size=(n, hv)), -30).astype(F32),
        beta=rng.uniform(0, 1, (n, hv)).astype(F32),
        state=rng.standard_normal((hv, dv, d)).astype(F32),
        parent=parent,
    )


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = MAX_NODES) -> np.ndarray:
    n = draw(st.integers(1, max_nodes))
    return np.array([draw(st.integers(-1 if i == 0 else 0, max(i - 1, -1))) for i in range(n)], np.int32)


@st.composite
def problems(draw: st.DrawFn, max_nodes: int = MAX_NODES) -> Problem:
    return make(
        draw(trees(max_nodes)),
        d=draw(st.sampled_from([16, 32, 64, 128])),
        dv=draw(st.sampled_from([16, 32, 48])),
        hk=draw(st.integers(1, 3)),
        hv=draw(st.integers(1, 5)),
        decay=draw(st.sampled_from([0.0, 0.01, 1.0, 10.0, 30.0])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


# -- references ---------------------------------------------------------------------------------------------------


def replay(p: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """out [N, Hv, dv], delta [N, Hv, dv] and the state after every node [N, Hv, dv, d], in float64."""
    key_head = np.arange(p.v.shape[1]) % p.k.shape[1]
    q, k = (x[:, key_head].astype(float) for x in (p.q, p.k))
    v, g, beta = (x.astype(float) for x in (p.v, p.g, p.beta))
    out, delta = np.empty_like(v), np.empty_like(v)
    states = np.empty((p.n, *p.state.shape))
    for i, parent in enumerate(p.parent):
        state = (p.state if parent < 0 else states[parent]) * np.exp(g[i])[:, None, None]
        delta[i] = beta[i][:, None] * (v[i] - np.einsum("hvk,hk->hv", state, k[i]))
        states[i] = state + delta[i][:, :, None] * k[i][:, None, :]
        out[i] = np.einsum("hvk,hk->hv", states[i], q[i]) / np.sqrt(q.shape[-1])
    return out, delta, states


def convolve(state: np.ndarray, x: np.ndarray, kernel: np.ndarray, parent: np.ndarray) -> np.ndarray:
    """state [K-1, channels], x [N, channels], kernel [channels, K] -> [N, channels], in float64."""
    out = np.empty(x.shape)
    for i in range(len(x)):
        columns = np.concatenate([state, x[ancestors(parent, i)]]).astype(float)[-kernel.shape[1] :]
        out[i] = np.einsum("kc,ck->c", columns, kernel.astype(float))
    return out


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float = 3e-6) -> None:
    """Largest error against the largest value."""
    assert np.isfinite(actual).all()
    assert np.abs(actual - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-6)


# -- the ops, run -------------------------------------------------------------------------------------------------


def delta_net_op(graph: Graph, p: Problem, operands: dict[str, int] | None = None) -> tuple[int, dict[str, int]]:
    given = operands or {}
    names = ("q", "k", "v", "g", "beta", "state", "parent")
    tensors = {name: given[name] if name in given else graph.tensor(getattr(p, name)) for name in names}
    return graph.op("ggml_gated_delta_net_tree", *tensors.values()), tensors


def run_tree(ggml: Ggml, p: Problem, *, n_threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """out and delta, each [N, Hv, dv]."""
    with ggml.graph() as graph:
        result, tensors = delta_net_op(graph, p)
        assert graph.supported(result)
        parts = [graph.op(f"ggml_gated_delta_net_tree_{name}", result) for name in ("out", "delta")]
        graph.compute(*parts, n_threads=n_threads)
        assert np.array_equal(graph.read(tensors["state"], *p.state.shape), p.state), "the state is only read"
        out, delta = (graph.read(part, *p.v.shape) for part in parts)
    return out, delta


def run_persist(ggml: Ggml, p: Problem, path: list[int], *, n_threads: int = 1) -> np.ndarray:
    """Tree op and persist in one graph; the state afterwards."""
    with ggml.graph() as graph:
        result, t = delta_net_op(graph, p)
        delta = graph.op("ggml_gated_delta_net_tree_delta", result)
        indices = graph.tensor(np.array(path, np.int32))
        advanced = graph.op("ggml_gated_delta_net_tree_persist", t["state"], t["k"], delta, t["g"], indices)
        assert graph.supported(advanced)
        graph.compute(advanced, n_threads=n_threads)
        state = graph.read(advanced, *p.state.shape)
        assert np.array_equal(state, graph.read(t["state"], *p.state.shape)), "the result is the state itself"
    return state


def run_conv(
    ggml: Ggml, state: np.ndarray, x: np.ndarray, kernel: np.ndarray, parent: np.ndarray, *, n_threads: int = 1
) -> np.ndarray:
    with ggml.graph() as graph:
        result = graph.op("ggml_ssm_conv_tree", *(graph.tensor(a) for a in (state, x, kernel, parent)))
        assert graph.supported(result)
        graph.compute(result, n_threads=n_threads)
        return graph.read(result, *x.shape)


def last_columns(state: np.ndarray, x: np.ndarray, path: list[int]) -> np.ndarray:
    """What the convolution's state becomes, by definition."""
    columns = [*state, *(x[node] for node in path if 0 <= node < len(x))]
    return np.stack(columns[-len(state) :])


def run_conv_persist(
    ggml: Ggml, state: np.ndarray, x: np.ndarray, path: list[int], *, n_threads: int = 1
) -> np.ndarray:
    """State and x as slices of wider matrices, around which nothing changes; the state afterwards."""
    with ggml.graph() as graph:
        wide = [
            np.concatenate([np.full((len(a), 3), np.nan, F32), a, np.full((len(a), 2), np.nan, F32)], 1)
            for a in (state, x)
        ]
        tensors = [graph.tensor(a) for a in wide]
        slices = [graph.view(t, a.shape, ((a.shape[1] + 5) * 4,), 12) for t, a in zip(tensors, (state, x), strict=True)]
        advanced = graph.op("ggml_ssm_conv_tree_persist", *slices, graph.tensor(np.array(path, np.int32)))
        assert graph.supported(advanced)
        graph.compute(advanced, n_threads=n_threads)
        after = graph.read(tensors[0], *wide[0].shape)
        assert np.isnan(np.delete(after, np.s_[3:-2], 1)).all()
        assert np.array_equal(graph.read(tensors[1], *wide[1].shape), wide[1], equal_nan=True), "x is only read"
        return after[:, 3:-2]


# -- gated_delta_net_tree -----------------------------------------------------------------------------------------

SHAPES = {"chain": chain, "star": star, "comb": comb, "binary": binary, "forest": forest}


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 33, 63, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_tree_follows_the_recurrence(ggml: Ggml, shape: str, n: int) -> None:
    p = make(SHAPES[shape](n), seed=n)
    expected_out, expected_delta, _ = replay(p)
    for n_threads in (1, 2):
        out, delta = run_tree(ggml, p, n_threads=n_threads)
        assert_close(out, expected_out)
        assert_close(delta, expected_delta)


@pytest.mark.parametrize("d", [16, 32, 64, 128])
@pytest.mark.parametrize(("hk", "hv"), [(1, 1), (2, 6), (3, 4), (4, 2), (3, 7)])
@pytest.mark.parametrize("n", [1, 5, 22])
def test_head_layouts(ggml: Ggml, d: int, hk: int, hv: int, n: int) -> None:
    p = make(comb(n), d=d, hk=hk, hv=hv)
    out, delta = run_tree(ggml, p, n_threads=2)
    expected = replay(p)
    assert_close(out, expected[0])
    assert_close(delta, expected[1])


@examples
@given(problems())
def test_any_tree(ggml: Ggml, p: Problem) -> None:
    out, delta = run_tree(ggml, p)
    expected = replay(p)
    assert_close(out, expected[0])
    assert_close(delta, expected[1])


@pytest.mark.parametrize("g", [0.0, -1.0, -30.0, -np.inf])
@pytest.mark.parametrize("n", [4, 64, 150])
def test_constant_decay(ggml: Ggml, g: float, n: int) -> None:
    p = make(chain(n), decay=0)
    p = replace(p, g=np.full_like(p.g, g))
    out, delta = run_tree(ggml, p)
    expected = replay(p)
    assert_close(out, expected[0])
    assert_close(delta, expected[1])


@pytest.mark.parametrize("n", [65, 100, 128, 129, 200])
@pytest.mark.parametrize("decay", [0.05, 30.0])
def test_chains_longer_than_a_tree(ggml: Ggml, n: int, decay: float) -> None:
    p = make(chain(n), d=32, dv=48, hk=2, hv=5, decay=decay)
    expected = replay(p)
    for n_threads in (1, 2):
        out, delta = run_tree(ggml, p, n_threads=n_threads)
        assert_close(out, expected[0])
        assert_close(delta, expected[1])


@pytest.mark.parametrize(("n", "n_real"), [(128, 65), (128, 100), (192, 64), (200, 1)])
def test_pads_end_a_long_chain(ggml: Ggml, n: int, n_real: int) -> None:
    p = make(np.where(np.arange(n) < n_real, chain(n), -1).astype(np.int32))
    real = p.nodes(np.arange(n_real))
    out, delta = run_tree(ggml, p)
    expected = replay(real)
    assert np.isfinite(out).all()
    assert np.isfinite(delta).all()
    assert_close(out[:n_real], expected[0])
    assert_close(delta[:n_real], expected[1])
    path = [*range(n_real), *[-1] * (n - n_real)]
    assert_close(run_persist(ggml, p, path), expected[2][-1])


def test_slices_of_one_matrix(ggml: Ggml) -> None:
    """q, k, v as slices of the convolution's output, g and beta as columns of wider matrices, as a model has them."""
    p = make(binary(37), d=32, dv=16, hk=2, hv=6)
    n, hk, d = p.k.shape
    hv, dv = p.v.shape[1:]
    matrix = np.concatenate(
        [p.q.reshape(n, -1), p.k.reshape(n, -1), p.v.reshape(n, -1), np.full((n, 9), np.nan, F32)], 1
    )
    gates = np.concatenate([p.g, p.beta], 1)
    row = matrix.shape[1] * 4
    with ggml.graph() as graph:
        whole, wide = graph.tensor(matrix), graph.tensor(gates)
        result, _ = delta_net_op(
            graph,
            p,
            {
                "q": graph.view(whole, (n, hk, d), (row, d * 4), 0),
                "k": graph.view(whole, (n, hk, d), (row, d * 4), hk * d * 4),
                "v": graph.view(whole, (n, hv, dv), (row, dv * 4), 2 * hk * d * 4),
                "g": graph.view(wide, (n, hv), (2 * hv * 4,), 0),
                "beta": graph.view(wide, (n, hv), (2 * hv * 4,), hv * 4),
            },
        )
        out = graph.op("ggml_gated_delta_net_tree_out", result)
        graph.compute(out, n_threads=2)
        assert_close(graph.read(out, n, hv, dv), replay(p)[0])


@pytest.mark.parametrize("n", [1, 4, 22, 64, 130])
@pytest.mark.parametrize(("hk", "hv"), [(1, 1), (2, 5)])
def test_bits_do_not_depend_on_threads(ggml: Ggml, n: int, hk: int, hv: int) -> None:
    p = make(chain(n) if n > MAX_NODES else comb(n), d=64, dv=80, hk=hk, hv=hv)
    path = ancestors(p.parent, n - 1)
    results = [(*run_tree(ggml, p, n_threads=t), run_persist(ggml, p, path, n_threads=t)) for t in (1, 2, 3, 7)]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert np.array_equal(a, b)


@examples
@given(problems(), st.randoms(use_true_random=False))
def test_renumbering_changes_nothing(ggml: Ggml, p: Problem, random: object) -> None:
    """Any order with parents first gives each node the same result."""
    keys = np.array([random.random() for _ in range(p.n)])  # type: ignore[attr-defined]
    order: list[int] = []
    ready = [i for i in range(p.n) if p.parent[i] < 0]
    while ready:
        node = min(ready, key=lambda i: keys[i])
        ready.remove(node)
        order.append(node)
        ready += [i for i in range(p.n) if p.parent[i] == node]
    place = np.empty(p.n + 1, np.int32)
    place[order], place[-1] = np.arange(p.n), -1  # parent -1 indexes the last entry
    moved = p.nodes(np.array(order))
    moved = replace(moved, parent=place[moved.parent])
    for a, b in zip(run_tree(ggml, p), run_tree(ggml, moved), strict=True):
        assert_close(b, a[order].astype(float))


@examples
@given(problems(), st.data())
def test_branches_do_not_see_each_other(ggml: Ggml, p: Problem, data: st.DataObject) -> None:
    """Other operands at one node change that node and what descends from it, and not one bit elsewhere."""
    node = data.draw(st.integers(0, p.n - 1))
    other = make(p.parent, d=p.k.shape[2], dv=p.v.shape[2], hk=p.k.shape[1], hv=p.v.shape[1], seed=1)
    changed = {}
    for name in ("q", "k", "v", "g", "beta"):
        changed[name] = getattr(p, name).copy()
        changed[name][node] = getattr(other, name)[node]
    outside = [i for i in range(p.n) if node not in ancestors(p.parent, i)]
    for a, b in zip(run_tree(ggml, p), run_tree(ggml, replace(p, **changed)), strict=True):
        assert np.array_equal(a[outside], b[outside])


@examples
@given(problems(max_nodes=40), st.integers(1, 24))
def test_pads_change_nothing(ggml: Ggml, p: Problem, n_pads: int) -> None:
    pads = make(forest(n_pads), d=p.k.shape[2], dv=p.v.shape[2], hk=p.k.shape[1], hv=p.v.shape[1], seed=2)
    names = ("q", "k", "v", "g", "beta", "parent")
    padded = replace(p, **{name: np.concatenate([getattr(p, name), getattr(pads, name)]) for name in names})
    for a, b in zip(run_tree(ggml, p), run_tree(ggml, padded), strict=True):
        assert np.isfinite(b).all()
        assert_close(b[: p.n], a.astype(float))


def test_impossible_parents_read_as_the_committed_state(ggml: Ggml) -> None:
    p = make(chain(8))
    wrong = replace(p, parent=np.array([0, 0, 5, 2, 2**31 - 1, -7, 5, -(2**31)], np.int32))
    right = replace(p, parent=np.array([-1, 0, -1, 2, -1, -1, 5, -1], np.int32))
    for a, b in zip(run_tree(ggml, wrong), run_tree(ggml, right), strict=True):
        assert np.array_equal(a, b)


# -- gated_delta_net_tree_persist ---------------------------------------------------------------------------------


@examples
@given(problems(), st.data())
def test_persist_equals_the_state_of_the_last_node(ggml: Ggml, p: Problem, data: st.DataObject) -> None:
    path = ancestors(p.parent, data.draw(st.integers(0, p.n - 1)))
    n_pads = data.draw(st.integers(0, 3))
    state = run_persist(ggml, p, [*path, *[-1] * n_pads], n_threads=2)
    assert_close(state, replay(p)[2][path[-1]])


@pytest.mark.parametrize("path", [[0], [0, 2, 4], [0, 1], [0, 2, 3], [0, 2, 4, 6, 8, 10, 11]])
def test_persist_skips_node_numbers(ggml: Ggml, path: list[int]) -> None:
    p = make(comb(12), hk=3, hv=7)
    assert ancestors(p.parent, path[-1]) == path
    assert_close(run_persist(ggml, p, path), replay(p)[2][path[-1]])


@pytest.mark.parametrize("n", [65, 128, 200])
@pytest.mark.parametrize("decay", [0.0, 0.05, 3.0, 30.0])
def test_persist_of_long_chains(ggml: Ggml, n: int, decay: float) -> None:
    p = make(chain(n), decay=decay, hk=2, hv=3)
    expected = replay(p)[2]
    for length in (n, n - 1, MAX_NODES, MAX_NODES + 1):
        path = [*range(length), *[-1] * (n - length)]
        assert_close(run_persist(ggml, p, path, n_threads=2), expected[length - 1])


def test_persist_keeps_digits_after_strong_decay(ggml: Ggml) -> None:
    """Sums of g from the root would cost digits here: small differences of numbers near -1800."""
    p = make(chain(64))
    p = replace(p, g=np.where(np.arange(64)[:, None] < 60, -30.0, -0.01).astype(F32) * np.ones_like(p.g))
    assert_close(run_persist(ggml, p, list(range(64))), replay(p)[2][-1], tolerance=1e-6)


@pytest.mark.parametrize("path", [[-1], [-1, -1, -1], [99, -5]])
def test_empty_path_keeps_the_state(ggml: Ggml, path: list[int]) -> None:
    p = make(chain(5))
    assert np.array_equal(run_persist(ggml, p, path), p.state)


def test_commits_add_up(ggml: Ggml) -> None:
    """Trees verified one after another, each from the state the last commit left, equal one long chain."""
    whole = make(chain(30))
    expected = replay(whole)
    state, at = whole.state, 0
    for step in (1, 7, 2, 16, 4):
        p = replace(whole.nodes(np.arange(at, at + step)), state=state, parent=chain(step))
        assert_close(run_tree(ggml, p)[0], expected[0][at : at + step])
        state, at = run_persist(ggml, p, list(range(step))), at + step
    assert_close(state, expected[2][-1])


# -- ssm_conv_tree ------------------------------------------------------------------------------------------------


def make_conv(parent: np.ndarray, channels: int, n_taps: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = [(n_taps - 1, channels), (len(parent), channels), (channels, n_taps)]
    state, x, kernel = (rng.standard_normal(shape).astype(F32) for shape in shapes)
    return state, x, kernel


@examples
@given(trees(), st.sampled_from([1, 3, 16, 63, 64, 100, 512, 700]), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_convolution(ggml: Ggml, parent: np.ndarray, channels: int, n_taps: int, seed: int) -> None:
    state, x, kernel = make_conv(parent, channels, n_taps, seed)
    one, two = (run_conv(ggml, state, x, kernel, parent, n_threads=n) for n in (1, 2))
    assert_close(one, convolve(state, x, kernel, parent))
    assert np.array_equal(one, two)


@pytest.mark.parametrize("n_taps", [2, 3, 4, 16])
def test_convolution_of_a_long_chain_with_pads(ggml: Ggml, n_taps: int) -> None:
    parent = np.where(np.arange(200) < 180, chain(200), -1).astype(np.int32)
    state, x, kernel = make_conv(parent, 48, n_taps, 0)
    assert_close(run_conv(ggml, state, x, kernel, parent, n_threads=2), convolve(state, x, kernel, parent))


def test_convolution_of_slices(ggml: Ggml) -> None:
    parent = comb(20)
    state, x, kernel = make_conv(parent, 80, 4, 0)
    with ggml.graph() as graph:
        wide = graph.tensor(np.concatenate([np.full((20, 7), np.nan, F32), x, np.full((20, 5), np.nan, F32)], 1))
        rows = graph.view(wide, x.shape, (92 * 4,), 7 * 4)
        result = graph.op("ggml_ssm_conv_tree", graph.tensor(state), rows, graph.tensor(kernel), graph.tensor(parent))
        graph.compute(result)
        assert_close(graph.read(result, *x.shape), convolve(state, x, kernel, parent))


# -- ssm_conv_tree_persist ----------------------------------------------------------------------------------------

PATHS = ([0], [0, 2], [0, 2, 4, 6, 8], [3, -1, -1], [-1, 99, 5, -5, 6], [*range(20)], [-1, -1], [99])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n_taps", [2, 3, 4, 16])
def test_the_last_columns_stay(ggml: Ggml, path: list[int], n_taps: int) -> None:
    for channels in (1, 63, 200):
        state, x, _ = make_conv(chain(20), channels, n_taps, channels)
        for n_threads in (1, 2, 3):
            after = run_conv_persist(ggml, state, x, path, n_threads=n_threads)
            assert np.array_equal(after, last_columns(state, x, path))


# -- what the builders refuse -------------------------------------------------------------------------------------

BAD_OPERANDS = {
    "head size": "make(chain(3), d=24)",
    "state shape": "replace(p, state=p.state[:, :16])",
    "parent length": "replace(p, parent=chain(2))",
    "parent type": "replace(p, parent=p.g[:, 0])",
}


@pytest.mark.parametrize("operands", BAD_OPERANDS.values(), ids=BAD_OPERANDS.keys())
def test_builder_refuses(operands: str) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.test_tree_ops import *; p = make(chain(3));"
        f"delta_net_op(Ggml(Path(sys.argv[1])).graph(), {operands})"
    )
    assert_builder_aborts(script)
