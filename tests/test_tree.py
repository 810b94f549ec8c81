"""The DDTree builder against the algorithm in Python, against brute force, and for what any tree must be."""

import heapq
import math
import zlib
from typing import NamedTuple

import numpy as np
import pytest
from _pydflash import ffi, lib
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT_TOKEN = 7
IDENTITY = np.eye(12)[1]


class Node(NamedTuple):
    token: int
    parent: int
    depth: int
    rank: int
    score: float


def call(
    ids,
    logp,
    budget,
    *,
    shape=lib.PF_SHAPE_TREE,
    weight=None,
    line=None,
    allowed=None,
    n_depth=None,
    n_rank=None,
):
    """Status and nodes of one pf_tree_build; the sizes are the arrays' own unless given.

    line: pairs of token and log-probability. allowed: of a tuple of tokens.
    """
    n = lib.PF_MAX_NODES
    ids = np.ascontiguousarray(ids, np.int32)
    logp = np.ascontiguousarray(logp, np.float32)
    columns = {name: np.full(n, -99, np.int32) for name in ("token", "parent", "depth", "rank")}
    score = np.full(n, np.nan, np.float32)
    n_nodes = ffi.new("int32_t *", -1)
    calibration = ffi.NULL
    if weight is not None:
        calibration = ffi.new("pf_calibration *", {"weight": list(map(float, weight))})
    along = ffi.NULL
    if line is not None:
        tokens = ffi.new("int32_t[]", [token for token, _ in line])
        line_logp = ffi.new("float[]", [own for _, own in line])
        along = ffi.new("pf_line *", {"n": len(line), "token": tokens, "logp": line_logp})
    ask = ffi.NULL
    if allowed is not None:
        ask = ffi.callback("int(void *, const int32_t *, int32_t)", lambda _, path, n: allowed(tuple(path[0:n])))
    status = lib.pf_tree_build(
        ffi.from_buffer("int32_t[]", ids),
        ffi.from_buffer("float[]", logp),
        logp.shape[0] if n_depth is None else n_depth,
        logp.shape[1] if n_rank is None else n_rank,
        budget,
        shape,
        calibration,
        ROOT_TOKEN,
        along,
        ask,
        ffi.NULL,
        *(ffi.from_buffer("int32_t[]", column) for column in columns.values()),
        ffi.from_buffer("float[]", score),
        n_nodes,
    )
    count = n_nodes[0]
    for column in columns.values():
        assert (column[max(count, 0) :] == -99).all()
    rows = zip(*(column[: max(count, 0)].tolist() for column in columns.values()), score.tolist(), strict=False)
    return status, [Node(*row) for row in rows]


def token_ids(logp):
    """Distinct ids per depth that tell where a token came from."""
    n_depth, n_rank = np.shape(logp)
    return 1000 * np.arange(1, n_depth + 1)[:, None] + np.arange(n_rank)[None, :]


def build(logp, budget, **options):
    status, nodes = call(token_ids(logp), logp, budget, **options)
    assert status == lib.PF_OK, ffi.string(lib.pf_last_error()).decode()
    return nodes


def paths(nodes):
    """The tuple of ranks from the root to each node."""
    result = [()]
    for node in nodes[1:]:
        result.append((*result[node.parent], node.rank))
    return result


def chances(nodes):
    return {path: math.exp(node.score) for path, node in zip(paths(nodes), nodes, strict=True)}


# ---- the definitions, again -------------------------------------------------------------------------------------


def log(probability):
    return math.log(probability) if probability > 0 else -math.inf


def features(p, first, rank, depth, deviations):
    """What the calibration weighs, as pydflash.h says: of a token with probability p, first that of rank 0."""
    p, first = min(p, math.exp(-1e-4)), min(first, math.exp(-1e-4))
    odds, top, left = math.log(p / (1 - p)) if p > 0 else -math.inf, float(rank == 0), math.log1p(min(deviations, 3))
    rest = 0.0 if rank == 0 else math.log(1 - first)
    deep, log_depth = float(depth > 1), math.log(depth)
    return [
        *(1.0, odds, top, top * odds if top else 0.0, math.log1p(rank), rest, deep, log_depth),
        *(log_depth * odds if depth > 1 else 0.0, left, left * odds if left else 0.0, left * top),
    ]


def conditionals(logp, weight=None):
    """f(depth, deviations) -> log-probability of each rank there, as pydflash.h says."""
    logp = np.asarray(logp, np.float32).astype(np.float64)

    def of(depth, deviations):
        row = logp[depth - 1]
        if weight is None:
            return row.tolist()
        x = [features(math.exp(own), math.exp(row[0]), rank, depth, deviations) for rank, own in enumerate(row)]
        return np.minimum.accumulate(-np.logaddexp(0, -np.array(x) @ np.asarray(weight))).tolist()

    return of


def ddtree(logp, budget, weight=None):
    """The official algorithm: (path, score) of the nodes, in the order the heap gives them."""
    of = conditionals(logp, weight)
    n_depth, n_rank = np.shape(logp)

    def candidate(path, parent_score):
        deviations = sum(rank > 0 for rank in path[:-1])
        return -(parent_score + of(len(path), deviations)[path[-1]]), path, parent_score

    heap = [candidate((0,), 0.0)] if n_depth else []
    taken = []
    while heap and len(taken) < budget:
        negative, path, parent_score = heapq.heappop(heap)
        taken.append((path, -negative))
        if path[-1] + 1 < n_rank:
            heapq.heappush(heap, candidate((*path[:-1], path[-1] + 1), parent_score))
        if len(path) < n_depth:
            heapq.heappush(heap, candidate((*path, 0), -negative))
    return taken


def numbered(taken):
    """Root, the rank-0 path, the rest as taken."""
    on_path = [entry for entry in taken if not any(entry[0])]
    return [((), 0.0), *on_path, *(entry for entry in taken if any(entry[0]))]


def prefix_closed_sets(n_depth, n_rank, size):
    """Every set of `size` nodes in which each node's parent is the root or in the set."""
    level = {frozenset()}
    for _ in range(size):
        grown = set()
        for nodes in level:
            for parent in [(), *nodes]:
                if len(parent) < n_depth:
                    grown |= {nodes | {(*parent, rank)} for rank in range(n_rank)} - {nodes}
        level = grown
    return level


def best_sum(logp, size, weight=None):
    """The most tokens a set of `size` nodes can be expected to have accepted."""
    of = conditionals(logp, weight)
    n_depth, n_rank = np.shape(logp)
    chance = {(): 1.0}
    for _ in range(n_depth):
        for path in [path for path in chance if len(path) < n_depth and (*path, 0) not in chance]:
            own = of(len(path) + 1, sum(rank > 0 for rank in path))
            chance |= {(*path, rank): chance[path] * math.exp(own[rank]) for rank in range(n_rank)}
    return max(sum(chance[path] for path in nodes) for nodes in prefix_closed_sets(n_depth, n_rank, size))


# ---- inputs ------------------------------------------------------------------------------------------------------


def random_rows(rng, n_depth, n_rank, *, spread=2.0, n_vocab=300):
    """The best n_rank of log-softmax rows."""
    logits = rng.normal(0, spread, (n_depth, n_vocab))
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.sort(-logp, -1)[:, :n_rank].astype(np.float32)


@st.composite
def rows(draw, max_depth=8, max_rank=6):
    """Rows of falling log-probabilities: often equal ones, within a row and between rows."""
    n_depth = draw(st.integers(0, max_depth))
    n_rank = draw(st.integers(1, max_rank))
    value = st.one_of(st.sampled_from([-0.25, -0.5, -1.0, -2.0]), st.floats(-40, 0, width=32))
    values = draw(st.lists(value, min_size=n_depth * n_rank, max_size=n_depth * n_rank))
    return -np.sort(-np.array(values, np.float32).reshape(n_depth, n_rank), -1)


def weights():
    """Identity, and off it in any direction, as far as learning could lead."""
    off = st.lists(st.one_of(st.just(0.0), st.floats(-2, 2, width=32)), min_size=12, max_size=12)
    return off.map(lambda values: np.array(values) + IDENTITY)


# ---- tests -------------------------------------------------------------------------------------------------------


def test_worked_example():
    # Depth 1: 0.5, 0.25. Depth 2: 0.75, 0.125. By hand: (0) .5, (0,0) .375, (1) .25, (1,0) .1875, (0,1) .0625.
    nodes = build(np.log([[0.5, 0.25], [0.75, 0.125]]), 4)
    assert [node[:4] for node in nodes] == [
        (ROOT_TOKEN, -1, 0, 0),
        (1000, 0, 1, 0),
        (2000, 1, 2, 0),
        (1001, 0, 1, 1),
        (2000, 3, 2, 0),
    ]
    assert np.exp([node.score for node in nodes]) == pytest.approx([1, 0.5, 0.375, 0.25, 0.1875], rel=1e-6)


@settings(deadline=None, max_examples=150)
@given(rows(), st.integers(0, 63))
def test_is_the_official_algorithm(logp, budget):
    expected = numbered(ddtree(logp, budget))
    nodes = build(logp, budget)
    assert paths(nodes) == [path for path, _ in expected]
    assert [node.score for node in nodes] == [np.float32(score) for _, score in expected]


@pytest.mark.parametrize("n_depth", [1, 7, 15, 63])
@pytest.mark.parametrize("n_rank", [1, 8, 64])
def test_is_the_official_algorithm_at_full_size(n_depth, n_rank):
    rng = np.random.default_rng(n_depth * 100 + n_rank)
    for budget in (1, 16, 63):
        logp = random_rows(rng, n_depth, n_rank, spread=rng.uniform(1, 5))
        assert paths(build(logp, budget)) == [path for path, _ in numbered(ddtree(logp, budget))]


def test_equal_probabilities_go_by_rank_tuple():
    halves = np.full((3, 3), math.log(0.5))
    assert paths(build(halves, 5)) == [(), (0,), (0, 0), (1,), (2,), (0, 1)]  # taken: 0, 1, 2, then 00, 01
    certain = np.zeros((3, 2))  # nothing to choose between: deeper before wider
    assert paths(build(certain, 6)) == [(), (0,), (0, 0), (0, 0, 0), (0, 0, 1), (0, 1), (0, 1, 0)]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("calibrated", [False, True])
def test_no_prefix_closed_set_is_likelier(seed, calibrated):
    rng = np.random.default_rng(seed)
    n_depth, n_rank, budget = rng.integers(1, 4), rng.integers(1, 4), rng.integers(1, 7)
    logp = random_rows(rng, n_depth, n_rank, spread=rng.uniform(1, 5), n_vocab=6)
    weight = IDENTITY + rng.normal(0, 0.5, 12) if calibrated else None
    nodes = build(logp, budget, weight=weight)
    size = len(nodes) - 1
    assert size == min(budget, sum(n_rank**depth for depth in range(1, n_depth + 1)))
    of = conditionals(logp, weight)
    chance = [1.0]
    for node, path in list(zip(nodes, paths(nodes), strict=True))[1:]:
        deviations = sum(rank > 0 for rank in path[:-1])
        chance.append(chance[node.parent] * math.exp(of(node.depth, deviations)[node.rank]))
    assert np.exp([node.score for node in nodes]) == pytest.approx(chance, rel=1e-5, abs=1e-30)
    assert sum(chance[1:]) == pytest.approx(best_sum(logp, size, weight), rel=1e-12)


@settings(deadline=None, max_examples=100)
@given(rows(), weights(), st.integers(0, 63))
def test_calibrated_scores(logp, weight, budget):
    """Scores are the definition's, and the multiset of them is the best-first one (ties may fall by a rounding)."""
    nodes = build(logp, budget, weight=weight)
    expected = sorted(math.exp(score) for _, score in ddtree(logp, budget, weight))
    assert sorted(math.exp(node.score) for node in nodes[1:]) == pytest.approx(expected, rel=1e-5, abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(rows(), st.one_of(st.none(), weights()), st.integers(0, 63))
def test_what_any_tree_must_be(logp, weight, budget):
    nodes = build(logp, budget, weight=weight)
    n_depth, n_rank = logp.shape
    everything = sum(n_rank**depth for depth in range(1, n_depth + 1))
    assert len(nodes) == 1 + min(budget, everything)
    assert nodes[0] == Node(ROOT_TOKEN, -1, 0, 0, 0.0)
    for index, node in enumerate(nodes[1:], 1):
        assert 0 <= node.parent < index
        assert node.depth == nodes[node.parent].depth + 1
        assert node.token == 1000 * node.depth + node.rank
        assert node.score <= nodes[node.parent].score
        assert not math.isnan(node.score)
    every_path = paths(nodes)
    assert len(set(every_path)) == len(nodes)
    straight = [not any(path) for path in every_path]
    n_straight = sum(straight)
    assert straight == [True] * n_straight + [False] * (len(nodes) - n_straight)
    assert [node.parent for node in nodes[:n_straight]] == list(range(-1, n_straight - 1))
    # A sibling of lower rank is always there too, and with one node less only one is missing.
    assert all((*path[:-1], path[-1] - 1) in every_path for path in every_path if path and path[-1] > 0)
    if budget:
        assert set(paths(build(logp, budget - 1, weight=weight))) <= set(every_path)
    # The same call gives the same tree.
    assert build(logp, budget, weight=weight) == nodes


@settings(deadline=None, max_examples=50)
@given(rows(max_depth=63), st.one_of(st.none(), weights()), st.integers(0, 63))
def test_chain_is_the_rank_0_path(logp, weight, budget):
    nodes = build(logp, budget, weight=weight, shape=lib.PF_SHAPE_CHAIN)
    assert paths(nodes) == [(0,) * depth for depth in range(min(budget, logp.shape[0]) + 1)]
    of = conditionals(logp, weight)
    scores = np.cumsum([0.0] + [of(depth, 0)[0] for depth in range(1, len(nodes))])
    assert [node.score for node in nodes] == pytest.approx(scores, rel=1e-6)


def test_identity_is_the_drafters_own():
    logp = np.log([[0.6, 0.3], [0.4, 0.35], [0.99999, 1e-6]])
    chance = chances(build(logp, 14, weight=IDENTITY))
    assert chance[(1, 0)] == pytest.approx(0.3 * 0.4)
    assert chance[(0, 1)] == pytest.approx(0.6 * 0.35)
    assert chance[(0, 0, 0)] == pytest.approx(0.6 * 0.4 * math.exp(-1e-4))  # nothing is certain


def test_each_weight_has_its_place():
    """Log-odds by hand for depth 3, rank 1 of p = 0.2 where rank 0 has 0.6, two tokens of other ranks above."""
    logp = np.log([[0.5, 0.4], [0.5, 0.4], [0.6, 0.2]])
    odds = math.log(0.2 / 0.8)
    by_hand = [1, odds, 0, 0, math.log(2), math.log(0.4), 1, math.log(3), math.log(3) * odds]
    by_hand += [math.log(3), math.log(3) * odds, 0]
    for i, x in enumerate(by_hand):
        weight = IDENTITY + 0.125 * np.eye(12)[i]
        chance = chances(build(logp, 14, weight=weight))
        found = chance[(1, 1, 1)] / chance[(1, 1)]
        assert math.log(found / (1 - found)) == pytest.approx(odds + 0.125 * x, rel=1e-4), i
    # Rank 0 there has weights of its own.
    chance = chances(build(logp, 14, weight=IDENTITY + 0.25 * np.eye(12)[2] + 0.5 * np.eye(12)[11]))
    found = chance[(1, 1, 0)] / chance[(1, 1)]
    assert math.log(found / (1 - found)) == pytest.approx(math.log(0.6 / 0.4) + 0.25 + 0.5 * math.log(3), rel=1e-4)


def test_a_rank_never_scores_above_the_one_before():
    # Rank 0 is never right, say the weights: rank 1 would have 0.3, but is held down to rank 0's.
    scores = [node.score for node in build(np.log([[0.6, 0.3]]), 2, weight=IDENTITY - 10 * np.eye(12)[2])]
    assert scores[1] == scores[2] == pytest.approx(math.log(0.6 / 0.4) - 10, rel=1e-3)


def test_weights_without_measure_stay_deterministic():
    sure = [[0.0, -200.0], [0.0, -3e38]]
    for size in (1e6, -1e6):
        for i in range(12):
            nodes = build(sure, 6, weight=IDENTITY + size * np.eye(12)[i])
            assert len(nodes) == 7
            assert not any(math.isnan(node.score) for node in nodes)


# ---- learning the weights ------------------------------------------------------------------------------------------


def learned(depth, deviations, logp, chosen):
    out = ffi.new("pf_calibration *")
    arrays = [np.ascontiguousarray(x, np.int32) for x in (depth, deviations, chosen)]
    logp = np.ascontiguousarray(logp, np.float32)
    ints = [ffi.from_buffer("int32_t[]", x) for x in arrays]
    status = lib.pf_calibrate(ints[0], ints[1], ffi.from_buffer("float[]", logp), ints[2], *logp.shape, out)
    assert status == lib.PF_OK, ffi.string(lib.pf_last_error()).decode()
    return np.array(list(out.weight))


def visited(rng, truth, n):
    """Nodes of a target that chooses as the weights say, as far as they leave each rank a share."""
    logp = random_rows(rng, n, 6, spread=3)
    depth, deviations = rng.integers(1, 16, n), rng.integers(0, 4, n)
    chosen = np.full(n, -1)
    for i in range(n):
        z = [
            np.dot(truth, features(math.exp(own), math.exp(logp[i, 0]), rank, depth[i], deviations[i]))
            for rank, own in enumerate(logp[i])
        ]
        share = 1 / (1 + np.exp(-np.array(z)))
        share = np.append(share, max(0.0, 1 - share.sum()))
        chosen[i] = rng.choice(7, p=share / share.sum())
    return depth, np.minimum(deviations, depth - 1), logp, np.where(chosen == 6, -1, chosen)


def test_one_node_moves_the_weights_by_newtons_step():
    logp = np.log([[0.5, 0.25, 0.125]])
    x = np.array([features(p, 0.5, rank, 4, 1) for rank, p in enumerate((0.5, 0.25, 0.125))])
    p = 1 / (1 + np.exp(-x @ IDENTITY))
    precision = 8 * np.eye(12) + (x * (p * (1 - p))[:, None]).T @ x
    step = np.linalg.solve(precision, x.T @ (np.array([0, 1, 0]) - p))
    assert learned([4], [1], logp, [1]) == pytest.approx(IDENTITY + step, abs=1e-6)


def test_learns_to_predict_what_the_target_chooses():
    rng = np.random.default_rng(5)
    truth = IDENTITY * 0.8 + np.array([0, 0, 0.6, 0, -0.3, 0.2, 0.3, 0.1, 0.05, -0.6, 0, -0.3])
    weight = learned(*visited(rng, truth, 4000))
    depth, deviations, logp, chosen = visited(rng, truth, 4000)
    said = np.zeros(2)
    for i in range(len(chosen)):
        for k, w in enumerate((IDENTITY, weight)):
            of = conditionals(logp[i : i + 1].repeat(depth[i], 0), w)
            said[k] += math.exp(of(depth[i], deviations[i])[0])
    right = (chosen == 0).sum()
    assert abs(said[1] / right - 1) < 0.03 < 0.1 < abs(said[0] / right - 1)


def test_learning_refuses_what_is_no_node():
    good = ([1], [0], [[-0.1, -3.0]], [0])
    for i, wrong, sentence in (
        (0, [0], "depth must be"),
        (1, [-1], "deviations at least"),
        (2, [[math.nan, -3.0]], "logp must be finite"),
        (3, [2], "chosen must be a rank"),
    ):
        with pytest.raises(AssertionError, match=sentence):
            learned(*(wrong if k == i else value for k, value in enumerate(good)))


# ---- a line of tokens besides, and tokens that may not be said ------------------------------------------------------


class Child(NamedTuple):
    token: int
    rank: int
    logp: float


def without(logp):
    return log(-math.expm1(logp))


def children(logp, path, line, weight=None):
    """Every child of a node, in order; path: the Childs above."""
    line = [(token, min(0.0, float(np.float32(own)))) for token, own in line]
    n_depth, n_rank = np.shape(logp)
    depth = len(path) + 1
    drafted = []
    if depth <= n_depth:
        of = conditionals(logp, weight)(depth, sum(node.rank != 0 for node in path))
        drafted = [Child(1000 * depth + rank, rank, of[rank]) for rank in range(n_rank)]
    if depth > len(line) or [node.token for node in path] != [token for token, _ in line[: depth - 1]]:
        return drafted
    token, own = line[depth - 1]
    both = next((child for child in drafted if child.token == token), Child(token, -1, -math.inf))
    others = [child for child in drafted if child is not both]
    if own > both.logp:
        left = without(own) - without(both.logp)
        others = [child._replace(logp=child.logp + left) for child in others]
    both = both._replace(logp=max(own, both.logp))
    return sorted([both, *others], key=lambda child: -child.logp)  # stable: the line's before its equals


def best_of_all(logp, budget, *, line=(), allowed=lambda path: True, chain=False, weight=None):
    """The first `budget` nodes of everything that there is, in order, and how they must be numbered."""
    everything = []

    def visit(path, places, score, first):
        if path:
            everything.append((-score, places, tuple(path), first))
        before = False
        for place, child in enumerate(children(logp, path, line, weight)):
            if allowed(tuple(node.token for node in [*path, child])):
                visit([*path, child], (*places, place), score + child.logp, first and not before)
                before = True
                if chain:
                    break

    visit([], (), 0.0, True)
    taken = sorted(everything, key=lambda node: node[:2])[:budget]
    return [node for node in taken if node[3]] + [node for node in taken if not node[3]]


def token_paths(nodes):
    result = [()]
    for node in nodes[1:]:
        result.append((*result[node.parent], node.token))
    return result


def some_forbidden(seed):
    """Forbids a quarter of all paths, always the same ones."""
    return lambda path: zlib.crc32(np.array([seed, *path], np.int32).tobytes()) % 4 > 0


@st.composite
def lines(draw, max_size=5):
    """Tokens that the drafter has at that depth, or (rank 9) hasn't; often as likely as one of its own."""
    value = st.one_of(st.sampled_from([0.0, -0.25, -0.5, -1.0, -2.0]), st.floats(-40, 0, width=32))
    ranks = draw(st.lists(st.tuples(st.sampled_from([0, 0, 1, 2, 9]), value), max_size=max_size))
    return [(1000 * depth + rank, own) for depth, (rank, own) in enumerate(ranks, 1)]


def test_worked_example_of_a_line():
    # Depth 1: a .5, b .25; depth 2: c .75, d .125. The line says b .6, d .1, x .5.
    # b has .6, and leaves a .5 x .4 / .75. Below b: c .75, d .125 (the drafter thinks better of it), then x.
    a, b, c, d, x = 1000, 1001, 2000, 2001, 3009
    nodes = build(np.log([[0.5, 0.25], [0.75, 0.125]]), 63, line=[(b, log(0.6)), (d, log(0.1)), (x, log(0.5))])
    chance = dict(zip(token_paths(nodes), np.exp([node.score for node in nodes]), strict=True))
    left = 0.5 * 0.4 / 0.75
    expected = {(): 1, (b,): 0.6, (b, c): 0.45, (a,): left, (a, c): left * 0.75}
    expected |= {(b, d): 0.075, (b, d, x): 0.0375, (a, d): left * 0.125}
    assert chance == pytest.approx(expected, rel=1e-6)
    assert list(chance) == [(), (b,), (b, c), (a,), (a, c), (b, d), (b, d, x), (a, d)]
    assert [node.rank for node in nodes] == [0, 1, 0, 0, 0, 1, -1, 1]


@settings(deadline=None, max_examples=200)
@given(
    rows(max_depth=3, max_rank=3),
    lines(),
    st.one_of(st.none(), st.integers(0, 9)),
    st.integers(0, 40),
    st.booleans(),
)
def test_the_likeliest_of_everything_there_is(logp, line, seed, budget, chain):
    allowed = some_forbidden(seed) if seed is not None else None
    options = {"line": line} | ({"allowed": allowed} if allowed else {})
    nodes = build(logp, budget, shape=lib.PF_SHAPE_CHAIN if chain else lib.PF_SHAPE_TREE, **options)
    expected = best_of_all(logp, budget, chain=chain, **options)
    assert token_paths(nodes)[1:] == [tuple(node.token for node in path) for _, _, path, _ in expected]
    assert [node.rank for node in nodes[1:]] == [path[-1].rank for _, _, path, _ in expected]
    assert [node.score for node in nodes[1:]] == [np.float32(-negative) for negative, *_ in expected]


@settings(deadline=None, max_examples=100)
@given(rows(max_depth=3, max_rank=3), lines(), weights(), st.integers(0, 40))
def test_calibrated_scores_with_a_line(logp, line, weight, budget):
    """As above, but equal sums may fall one way or the other by a rounding."""
    nodes = build(logp, budget, weight=weight, line=line)
    expected = best_of_all(logp, budget, weight=weight, line=line)
    scores = [np.sort(np.exp(scores)) for scores in ([n.score for n in nodes[1:]], [-n for n, *_ in expected])]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5, abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(rows(max_depth=16), st.one_of(st.none(), weights()), lines(max_size=63), st.integers(1, 63))
def test_what_any_tree_with_a_line_must_be(logp, weight, line, budget):
    asked = []

    def allowed(path):
        asked.append(path)
        return some_forbidden(1)(path)

    options = {"weight": weight, "line": line, "allowed": allowed}
    nodes = build(logp, budget, **options)
    every_path = token_paths(nodes)
    assert len(set(every_path)) == len(nodes)  # no two siblings with one token
    assert len(set(asked)) == len(asked)  # and no question twice
    assert all(map(some_forbidden(1), every_path[1:]))
    line_tokens = tuple(token for token, _ in line)
    for index, (node, path) in enumerate(list(zip(nodes, every_path, strict=True))[1:], 1):
        assert 0 <= node.parent < index
        assert node.depth == nodes[node.parent].depth + 1
        assert node.score <= nodes[node.parent].score
        assert not math.isnan(node.score)
        assert node.depth <= logp.shape[0] or path == line_tokens[: node.depth]
    straight = 0
    while straight + 1 < len(nodes) and nodes[straight + 1].parent == straight:
        straight += 1
    likeliest = {}
    for path, node in zip(every_path[1:], nodes[1:], strict=True):
        likeliest[path[:-1]] = max(likeliest.get(path[:-1], -math.inf), node.score)
    assert all(nodes[i].score == likeliest[every_path[i][:-1]] for i in range(1, straight + 1))
    assert set(token_paths(build(logp, budget - 1, **options))) <= set(every_path)
    assert build(logp, budget, **options) == nodes
    assert build(logp, budget, weight=weight, line=[]) == build(logp, budget, weight=weight)


def test_a_line_goes_deeper_than_the_drafter():
    line = [(1000 * depth + 9, 0.0) for depth in range(1, 64)]
    nodes = build(np.log([[0.6, 0.3]]), 63, line=line)
    assert [node.token for node in nodes] == [ROOT_TOKEN, *(token for token, _ in line)]
    assert [node.parent for node in nodes] == list(range(-1, 63))
    assert [node.token for node in build(np.empty((0, 0)), 5, line=line)[1:]] == [token for token, _ in line[:5]]


def test_of_a_certain_line_nothing_else_is_asked():
    asked = []
    line = [(1000 * depth + depth % 3, 0.0) for depth in range(1, 11)]
    rng = np.random.default_rng(1)
    nodes = build(random_rows(rng, 10, 8), 10, line=line, allowed=lambda path: asked.append(path) or True)
    assert [node.token for node in nodes[1:]] == [token for token, _ in line]
    assert len(asked) == 10


def test_nothing_allowed_is_the_root_alone():
    logp = random_rows(np.random.default_rng(1), 15, 16)
    assert len(build(logp, 63, line=[(1001, 0.0)], allowed=lambda path: False)) == 1


# ---- refusals ----------------------------------------------------------------------------------------------------

GOOD = np.log([[0.6, 0.3], [0.5, 0.2]])


def with_entry(value):
    logp = GOOD.copy()
    logp[1, 1] = value
    return logp


@pytest.mark.parametrize(
    ("logp", "options", "words"),
    [
        (GOOD, {"budget": -1}, "budget"),
        (GOOD, {"budget": 64}, "budget"),
        (GOOD, {"shape": 2}, "shape"),
        (GOOD, {"n_depth": -1}, "n_depth"),
        (GOOD, {"n_depth": 64}, "n_depth"),
        (GOOD, {"n_rank": 0}, "n_rank"),
        (GOOD, {"n_rank": 65}, "n_rank"),
        (with_entry(math.nan), {}, r"logp\[1\]\[1\]"),
        (with_entry(-math.inf), {}, r"logp\[1\]\[1\]"),
        (with_entry(0.5), {}, r"logp\[1\]\[1\]"),
        (with_entry(-0.1), {}, r"logp\[1\] rises at rank 1"),
        (GOOD, {"weight": [math.nan] * 12}, "weight of the calibration"),
        (GOOD, {"weight": [1e7] * 12}, "weight of the calibration"),
        (GOOD, {"line": [(1, 0.0)] * 64}, "0 to 63 tokens"),
        (GOOD, {"line": [(1, -1.0), (2, math.nan)]}, r"line logp\[1\]"),
        (GOOD, {"line": [(1, 0.5)]}, r"line logp\[0\]"),
        (GOOD, {"line": [(1, -math.inf)]}, r"line logp\[0\]"),
    ],
)
def test_bad_input_is_an_error_that_says_where(logp, options, words):
    status, nodes = call(token_ids(logp), logp, **{"budget": 4, **options})
    assert status == lib.PF_ERR_ARGUMENT
    assert nodes == []
    with pytest.raises(ValueError, match=words):
        raise ValueError(ffi.string(lib.pf_last_error()).decode())


def test_null_arrays():
    outputs = [ffi.new("int32_t[64]") for _ in range(4)] + [ffi.new("float[64]"), ffi.new("int32_t *")]
    null = ffi.NULL
    rest = (null, 1, null, null, null)
    assert lib.pf_tree_build(null, null, 3, 2, 4, 0, *rest, *outputs) == lib.PF_ERR_ARGUMENT
    assert lib.pf_tree_build(null, null, 0, 0, 4, 0, *rest, *outputs) == lib.PF_OK  # nothing drafted: the root alone
    assert outputs[-1][0] == 1
    no_tokens = ffi.new("pf_line *", {"n": 1})
    assert lib.pf_tree_build(null, null, 0, 0, 4, 0, null, 1, no_tokens, null, null, *outputs) == lib.PF_ERR_ARGUMENT
    for missing in range(6):
        some = [null if i == missing else output for i, output in enumerate(outputs)]
        assert lib.pf_tree_build(null, null, 0, 0, 4, 0, *rest, *some) == lib.PF_ERR_ARGUMENT
