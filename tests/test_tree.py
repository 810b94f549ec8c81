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
    rate=None,
    line=None,
    allowed=None,
    n_depth=None,
    n_rank=None,
    n_bins=None,
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
    if rate is not None:
        rate = np.ascontiguousarray(rate, np.float32)
        calibration = ffi.new("pf_calibration *")
        calibration.n_deviations, calibration.n_bins = rate.shape
        calibration.rate = ffi.from_buffer("float[]", rate)
        if n_bins is not None:
            calibration.n_bins = n_bins
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


def conditionals(logp, rate=None):
    """f(depth, deviations) -> log-probability of each rank there, as pydflash.h says."""
    logp = np.asarray(logp, np.float32).astype(np.float64)

    def of(depth, deviations):
        row = logp[depth - 1]
        if rate is None:
            return row.tolist()
        p = np.exp(row)
        n_deviations, n_bins = np.shape(rate)
        hit = float(np.float32(rate[min(deviations, n_deviations - 1)][min(int(p[0] * n_bins), n_bins - 1)]))
        rest = max(1 - p[0], p[1:].sum())
        shares = [hit, *((1 - hit) * p[1:] / rest if rest > 0 else np.zeros(len(p) - 1))]
        return [log(share) for share in np.minimum.accumulate(shares)]

    return of


def ddtree(logp, budget, rate=None):
    """The official algorithm: (path, score) of the nodes, in the order the heap gives them."""
    of = conditionals(logp, rate)
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


def best_sum(logp, size, rate=None):
    """The most tokens a set of `size` nodes can be expected to have accepted."""
    of = conditionals(logp, rate)
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


@st.composite
def tables(draw):
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    rate = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1, width=32))
    values = draw(st.lists(rate, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    return np.array(values, np.float32).reshape(shape)


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
    rate = rng.choice([0.0, 0.1, 0.5, 0.9, 1.0, rng.random()], (rng.integers(1, 4), rng.integers(1, 5)))
    rate = rate if calibrated else None
    nodes = build(logp, budget, rate=rate)
    size = len(nodes) - 1
    assert size == min(budget, sum(n_rank**depth for depth in range(1, n_depth + 1)))
    of = conditionals(logp, rate)
    chance = [1.0]
    for node, path in list(zip(nodes, paths(nodes), strict=True))[1:]:
        deviations = sum(rank > 0 for rank in path[:-1])
        chance.append(chance[node.parent] * math.exp(of(node.depth, deviations)[node.rank]))
    assert np.exp([node.score for node in nodes]) == pytest.approx(chance, rel=1e-5, abs=1e-30)
    assert sum(chance[1:]) == pytest.approx(best_sum(logp, size, rate), rel=1e-12)


@settings(deadline=None, max_examples=100)
@given(rows(), tables(), st.integers(0, 63))
def test_calibrated_scores(logp, rate, budget):
    """Scores are the definition's, and the multiset of them is the best-first one (ties may fall by a rounding)."""
    nodes = build(logp, budget, rate=rate)
    expected = sorted(math.exp(score) for _, score in ddtree(logp, budget, rate))
    assert sorted(math.exp(node.score) for node in nodes[1:]) == pytest.approx(expected, rel=1e-5, abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(rows(), st.one_of(st.none(), tables()), st.integers(0, 63))
def test_what_any_tree_must_be(logp, rate, budget):
    nodes = build(logp, budget, rate=rate)
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
        assert set(paths(build(logp, budget - 1, rate=rate))) <= set(every_path)
    # The same call gives the same tree.
    assert build(logp, budget, rate=rate) == nodes


@settings(deadline=None, max_examples=50)
@given(rows(max_depth=63), st.one_of(st.none(), tables()), st.integers(0, 63))
def test_chain_is_the_rank_0_path(logp, rate, budget):
    nodes = build(logp, budget, rate=rate, shape=lib.PF_SHAPE_CHAIN)
    assert paths(nodes) == [(0,) * depth for depth in range(min(budget, logp.shape[0]) + 1)]
    of = conditionals(logp, rate)
    scores = np.cumsum([0.0] + [of(depth, 0)[0] for depth in range(1, len(nodes))])
    assert [node.score for node in nodes] == pytest.approx(scores, rel=1e-6)


def test_deviations_and_bins_pick_the_rate():
    # Rank 0 has 0.6 at depth 1 (bin 1 of 2), 0.4 at depth 2 (bin 0), 0.6 at depth 3.
    logp = np.log([[0.6, 0.3], [0.4, 0.35], [0.6, 0.3]])
    rate = [[0.50, 0.90], [0.70, 0.80], [0.20, 0.55]]
    chance = chances(build(logp, 14, rate=rate))
    assert chance[(0,)] == pytest.approx(0.9)
    assert chance[(1,)] == pytest.approx(0.1 * 0.3 / 0.4)
    assert chance[(0, 0)] == pytest.approx(0.9 * 0.5)
    assert chance[(0, 1)] == pytest.approx(0.9 * 0.5 * 0.35 / 0.6)
    assert chance[(1, 0)] == pytest.approx(0.075 * 0.7)  # one deviation: the second line
    assert chance[(1, 0, 0)] == pytest.approx(0.075 * 0.7 * 0.8)
    assert chance[(1, 1, 0)] == pytest.approx(0.075 * (0.3 * 0.35 / 0.6) * 0.55)  # two: the third
    # The last line stands for all that is more: two lines only give two deviations the second.
    chance = chances(build(logp, 14, rate=rate[:2]))
    assert chance[(1, 1, 0)] == pytest.approx(0.075 * (0.3 * 0.35 / 0.6) * 0.8)


def test_a_rank_never_scores_above_the_one_before():
    # Never right at rank 0, says the table: rank 1 would have 0.3 / 0.4, but is held down to rank 0's.
    assert [node.score for node in build(np.log([[0.6, 0.3]]), 2, rate=[[0.0]])] == [0, -math.inf, -math.inf]
    scores = [node.score for node in build(np.log([[0.6, 0.3, 0.1]]), 3, rate=[[0.3]])]
    assert np.exp(scores) == pytest.approx([1, 0.3, 0.3, 0.7 * 0.1 / 0.4])


def test_rates_of_zero_and_one_come_last_and_stay_deterministic():
    logp = np.log([[0.6, 0.3], [0.6, 0.3]])
    # Rank 0 is certain at depth 1; after it, nothing is likely.
    assert paths(build(logp, 6, rate=[[1.0], [0.0]])) == [(), (0,), (0, 0), (0, 1), (1,), (1, 0), (1, 1)]
    # A drafter so sure that nothing is left for the others, in float32.
    sure = [[0.0, -200.0], [0.0, -3e38]]
    for rate in ([[0.9]], [[1.0]], [[0.0]]):
        nodes = build(sure, 6, rate=rate)
        assert len(nodes) == 7
        assert not any(math.isnan(node.score) for node in nodes)
    assert math.exp(build(sure, 6, rate=[[0.9]])[2].score) == pytest.approx(0.81)


# ---- a line of tokens besides, and tokens that may not be said ------------------------------------------------------


class Child(NamedTuple):
    token: int
    rank: int
    logp: float


def without(logp):
    return log(-math.expm1(logp))


def children(logp, path, line, rate=None):
    """Every child of a node, in order; path: the Childs above."""
    line = [(token, min(0.0, float(np.float32(own)))) for token, own in line]
    n_depth, n_rank = np.shape(logp)
    depth = len(path) + 1
    drafted = []
    if depth <= n_depth:
        of = conditionals(logp, rate)(depth, sum(node.rank != 0 for node in path))
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


def best_of_all(logp, budget, *, line=(), allowed=lambda path: True, chain=False, rate=None):
    """The first `budget` nodes of everything that there is, in order, and how they must be numbered."""
    everything = []

    def visit(path, places, score, first):
        if path:
            everything.append((-score, places, tuple(path), first))
        before = False
        for place, child in enumerate(children(logp, path, line, rate)):
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
@given(rows(max_depth=3, max_rank=3), lines(), tables(), st.integers(0, 40))
def test_calibrated_scores_with_a_line(logp, line, rate, budget):
    """As above, but equal sums may fall one way or the other by a rounding."""
    nodes = build(logp, budget, rate=rate, line=line)
    expected = best_of_all(logp, budget, rate=rate, line=line)
    scores = [np.sort(np.exp(scores)) for scores in ([n.score for n in nodes[1:]], [-n for n, *_ in expected])]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5, abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(rows(max_depth=16), st.one_of(st.none(), tables()), lines(max_size=63), st.integers(1, 63))
def test_what_any_tree_with_a_line_must_be(logp, rate, line, budget):
    asked = []

    def allowed(path):
        asked.append(path)
        return some_forbidden(1)(path)

    options = {"rate": rate, "line": line, "allowed": allowed}
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
    assert build(logp, budget, rate=rate, line=[]) == build(logp, budget, rate=rate)


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
        (GOOD, {"rate": [[0.5, 1.5]]}, r"rate\[0\]\[1\]"),
        (GOOD, {"rate": [[0.5], [-0.1]]}, r"rate\[1\]\[0\]"),
        (GOOD, {"rate": [[math.nan]]}, r"rate\[0\]\[0\]"),
        (GOOD, {"rate": [[0.5]], "n_bins": 0}, "n_bins"),
        (GOOD, {"rate": [[0.5]], "n_bins": 2**30}, "n_bins"),
        (GOOD, {"rate": np.full((65, 1), 0.5)}, "n_deviations"),
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
