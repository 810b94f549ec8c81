"""What a step moves between the host and where the session computes, counted.

The CPU backend makes the same copies as a GPU would, so what is counted here is what crosses the bus there: embeddings
and indices one way, token ids, log-probabilities and (when sampling) the logits of visited nodes the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydflash
from pydflash import options
from pydflash._lib import check, ffi, lib
from pydflash.results import Counters
from tests.tiny_models import TinyDraft, TinyTarget

F32, I32 = 4, 4  # bytes
KV_GRANULE = 256
BLOCK = 16

TARGET = TinyTarget(n_ctx=4096)
WIDE = TinyTarget(n_ctx=4096, n_vocab=5000, n_embd=96)


def write_pair(folder: Path, target: TinyTarget) -> tuple[Path, Path]:
    draft = TinyDraft(
        n_embd=target.n_embd,
        n_vocab=target.n_vocab,
        n_target_layers=target.n_layer,
        target_ids=(0, 2),
        block_size=BLOCK,
    )
    return target.write(folder / "target.gguf"), draft.write(folder / "draft.gguf")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    return {
        name: write_pair(tmp_path_factory.mktemp(name), target)
        for name, target in {"narrow": TARGET, "wide": WIDE}.items()
    }


@pytest.fixture(scope="module")
def own_drafts(pairs: dict[str, tuple[Path, Path]]) -> Iterator[pydflash.Session]:
    """The shipped pair, whose drafts are accepted now and then."""
    with pydflash.Session(n_ctx=1024, budget=22, n_threads=1) as session:
        yield session


def prompt(n: int, n_vocab: int) -> list[int]:
    return np.random.default_rng(n).integers(0, n_vocab, n).tolist()


# -- what a step may move ------------------------------------------------------------------------------------------


def bucket(n: int) -> int:
    """Rows that a graph for n of them has."""
    return -(-n // 64) * 64 if n > 64 else 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Formula:
    """Bytes of one step. Neither the context's length nor the vocabulary's size is in it."""

    n_embd: int
    n_nodes: int  # of the verify pass, the root and pads included
    block: int = BLOCK  # 0: no drafter

    @property
    def tree_embeddings(self) -> int:
        return F32 * self.n_embd * self.n_nodes

    def bytes_set(self, n_waiting: int, *, drafted: bool, moved: bool) -> int:
        total = self.tree_embeddings + I32 * (3 * self.n_nodes + 1)  # parent, position, KV row; n
        if self.block:
            total += I32 * self.n_nodes  # feature row
        if drafted:
            total += F32 * self.n_embd + I32 * (self.block + 1)  # the pending token, positions; n
        total += I32 * self.n_nodes  # the path, in the pass itself or in the commit
        if moved:
            total += I32 * 2 * self.n_nodes  # KV rows, from and to
        if drafted:
            total += I32 * 3 * bucket(n_waiting)  # nodes, positions and slots for the drafter's context
        return total

    @staticmethod
    def bytes_got(n_real: int, n_depth: int, n_rank: int) -> int:
        """Ids and log-probabilities: of the drafted block, and of the target's choice at each node."""
        return (I32 + F32) * (n_rank * n_depth + n_real)


@dataclass(frozen=True)
class Step:
    traffic: Counters  # of the step and its commit
    n_tokens: int  # tokens said, which is nodes visited
    n_nodes: int  # real nodes, the root included
    n_before: int  # committed tokens
    n_waiting: int  # of those, tokens since the last draft, or the last chunk of the prompt


def counted_steps(
    session: pydflash.Session, ids: list[int], n_steps: int, *, budget: int, temperature: float = 0.0
) -> Iterator[Step]:
    handle = session._core.session
    params, keep = options.generate_params(
        temperature=temperature, top_k=0, top_p=1, min_p=0, seed=1, budget=budget, chain=False, stop_ids=[]
    )
    check(lib.pf_session_reset(handle))
    check(lib.pf_session_configure(handle, params))
    check(lib.pf_session_append(handle, ids, len(ids)))
    result = ffi.new("pf_step_result *", {"size": ffi.sizeof("pf_step_result")})
    n = len(ids) - 1
    n_waiting = n % 512
    for _ in range(n_steps):
        before = session.counters
        check(lib.pf_session_step(handle, 1000, result))
        check(lib.pf_session_commit(handle, result.n_tokens, ffi.NULL))
        yield Step(session.counters - before, result.n_tokens, result.n_nodes, n, n_waiting)
        n_waiting = result.n_tokens
        n += result.n_tokens
    del keep


def open_pair(pair: tuple[Path, Path | None], **kwargs: Any) -> pydflash.Session:
    return pydflash.Session(*pair, **{"n_ctx": 2048, "n_threads": 1, "kv_type": "f32", **kwargs})


# -- bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_prompt", [9, 900])
@pytest.mark.parametrize("name", ["narrow", "wide"])
@pytest.mark.parametrize("budget", [5, 22, 63])
def test_a_greedy_step_moves_what_the_formula_says(
    pairs: dict[str, tuple[Path, Path]], name: str, budget: int, n_prompt: int
) -> None:
    """Two vocabularies, two widths, two depths: one formula, which knows of width only."""
    with open_pair(pairs[name], budget=budget) as session:
        formula = Formula(session.n_embd, budget + 1)
        for step in counted_steps(session, prompt(n_prompt, session.n_vocab), 12, budget=budget):
            allowed = [formula.bytes_set(step.n_waiting, drafted=True, moved=moved) for moved in (False, True)]
            assert step.traffic.bytes_set in allowed
            assert step.n_nodes == budget + 1
            assert step.traffic.bytes_get == formula.bytes_got(step.n_nodes, min(budget, BLOCK - 1), budget)
            assert (step.traffic.n_set, step.traffic.n_get, step.traffic.graph_runs) == (6, 2, 4)


def test_steps_that_move_rows_and_steps_that_do_not(own_drafts: pydflash.Session) -> None:
    """Drafts of the shipped pair are accepted along rank 0 and off it: both kinds of commit are in the formula."""
    formula = Formula(own_drafts.n_embd, 23)
    seen = set()
    ids = own_drafts.tokenize("def add(a, b):\n    return a + b\n\n\nclass Point:\n    def __init__(self, x, y):\n")
    for step in counted_steps(own_drafts, ids, 30, budget=22):
        moved = step.traffic.bytes_set - formula.bytes_set(step.n_waiting, drafted=True, moved=False)
        assert moved in (
            0,
            formula.bytes_set(1, drafted=True, moved=True) - formula.bytes_set(1, drafted=True, moved=False),
        )
        seen.add((moved > 0, step.n_tokens > 2))
    assert {(False, True), (True, False), (True, True)} & seen
    assert {long for _, long in seen} == {False, True}
    assert {moved for moved, _ in seen} == {False, True}


@pytest.mark.parametrize("with_drafter", [False, True])
def test_a_plain_step(pairs: dict[str, tuple[Path, Path]], with_drafter: bool) -> None:
    target, draft = pairs["wide"]
    with open_pair((target, draft if with_drafter else None), budget=0) as session:
        formula = Formula(session.n_embd, 1, block=BLOCK if with_drafter else 0)
        for step in counted_steps(session, prompt(40, session.n_vocab), 10, budget=0):
            assert step.traffic.bytes_set == formula.bytes_set(0, drafted=False, moved=False)
            assert step.traffic.bytes_get == formula.bytes_got(1, 0, 0)
            assert step.traffic.graph_runs == 1  # what the drafter would need waits until it is asked


def test_a_sampled_step_adds_the_rows_of_visited_nodes(own_drafts: pydflash.Session) -> None:
    formula = Formula(own_drafts.n_embd, 23)
    ids = own_drafts.tokenize("The old man went down to the sea, and")
    visited = []
    for step in counted_steps(own_drafts, ids, 40, budget=22, temperature=0.7):
        row = F32 * own_drafts.n_vocab
        assert step.traffic.bytes_get == formula.bytes_got(0, BLOCK - 1, 22) + step.n_tokens * row
        assert step.traffic.n_get == 1 + step.n_tokens
        allowed = [formula.bytes_set(step.n_waiting, drafted=True, moved=moved) for moved in (False, True)]
        assert step.traffic.bytes_set in allowed
        visited.append(step.n_tokens)
    assert max(visited) > 1


def test_the_27b_at_128k_stays_under_64_kib() -> None:
    """By the formula that the tests above hold the runtime to, which the length of the context is no part of."""
    formula = Formula(n_embd=5120, n_nodes=23)
    most = formula.bytes_set(BLOCK, drafted=True, moved=True) + formula.bytes_got(23, BLOCK - 1, 22)
    assert formula.tree_embeddings == 460 * 1024
    assert most - formula.tree_embeddings == 24_212


# -- graphs and memory ---------------------------------------------------------------------------------------------


def test_a_thousand_steps_build_a_graph_for_each_bucket_and_allocate_nothing(
    pairs: dict[str, tuple[Path, Path]],
) -> None:
    budget = 6
    with open_pair(pairs["narrow"], n_ctx=4096, budget=budget, n_ring=512) as session:
        ids = prompt(30, session.n_vocab)
        shapes: set[tuple[str, int]] = set()
        first = session.counters
        assert first == Counters(0, 0, 0, 0, 0, 0, 0)
        steps = []
        for step in counted_steps(session, ids, 1000, budget=budget):
            steps.append(step)
            shapes.add(("verify", -(-(step.n_before + budget + 1) // KV_GRANULE)))
            shapes.add(("draft", -(-(BLOCK + min(step.n_before, 512)) // KV_GRANULE)))
            shapes.add(("append", bucket(step.n_waiting)))
        total = session.counters
        # Beside these: the prompt's pass, and a commit that moves rows and one that does not.
        assert len({s for s in shapes if s[0] == "verify"}) >= 4
        assert total.graphs_built <= len(shapes) + 3
        assert total.buffers == 0
        assert total.graph_runs == 1 + 4 * 1000
        # A bucket's second step builds nothing.
        assert sum(step.traffic.graphs_built == 0 for step in steps) >= 1000 - len(shapes) - 2


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("with_drafter", [False, True])
def test_all_memory_is_there_from_the_start(
    pairs: dict[str, tuple[Path, Path]], kv_type: str, with_drafter: bool
) -> None:
    """Prompts of every bucket, up to a full context, plain and drafted, greedy and sampled."""
    target, draft = pairs["narrow"]
    with open_pair(
        (target, draft if with_drafter else None), n_ctx=1300, n_batch=192, n_ring=256, budget=12, kv_type=kv_type
    ) as session:
        for i, n in enumerate([1, 2, 3, 9, 17, 64, 65, 129, 193, 300, 700, 1290]):
            session.generate(prompt(n, session.n_vocab), max_tokens=10, temperature=i % 2, seed=1, ignore_eos=True)
        assert session.counters.buffers == 0


def test_a_run_with_a_larger_budget_makes_room(pairs: dict[str, tuple[Path, Path]]) -> None:
    with open_pair(pairs["narrow"], budget=2) as small, open_pair(pairs["narrow"], budget=40) as large:
        ids = prompt(20, small.n_vocab)
        assert small.generate(ids, max_tokens=30).ids == large.generate(ids, max_tokens=30).ids
        assert small.counters.buffers == 0
        assert small.generate(ids, max_tokens=30, budget=40).ids == large.generate(ids, max_tokens=30).ids
        assert small.counters.buffers >= 1
        assert large.counters.buffers == 0
        grown = small.counters.buffers
        small.generate(ids, max_tokens=30, budget=40)
        assert small.counters.buffers == grown


def test_looking_inside_may_need_more_and_changes_nothing(pairs: dict[str, tuple[Path, Path]]) -> None:
    with open_pair(pairs["wide"], budget=8) as session:
        ids = prompt(600, session.n_vocab)
        before = session.generate(ids, max_tokens=20).ids
        logits = session.logits(ids)
        session.hidden(ids, [0, session.n_layer])
        session.draft_logits(ids)
        assert session.generate(ids, max_tokens=20).ids == before
        assert before[0] == int(logits[-1].argmax())
