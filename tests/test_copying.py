"""Copying from the timeline: matches against brute force, and the text, which stays what the target says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pydflash
from pydflash import models
from pydflash._handles import Models, draft_file
from pydflash._lib import check, ffi, lib
from tests.test_timeline_core import Core
from tests.tiny_models import to_f32

SHORTEST, LONGEST = 3, 32  # matches, as pydflash.h says
BLOCK = 16  # of the drafter that ships

# ---- matches -----------------------------------------------------------------------------------------------------


def matches(tokens: Sequence[int], *, first: int = 0, before: Sequence[int] = ()) -> list[tuple[int, int]]:
    """(at, length) behind each prefix of tokens that is longer than `first`."""
    at, length = ffi.new("int64_t[]", len(tokens) + 1), ffi.new("int32_t[]", len(tokens) + 1)
    check(lib.pf_copy_matches(list(before), len(before), list(tokens), len(tokens), first, at, length))
    n = len(tokens) - first
    return list(zip(at[0:n], length[0:n], strict=True))


def brute_force(tokens: Sequence[int]) -> tuple[int, int]:
    """The longest match of the end of tokens, the latest of equals."""
    best = (-1, 0)
    for at in range(len(tokens) - 2, -1, -1):
        length = 0
        while length < min(LONGEST, at + 1) and tokens[at - length] == tokens[len(tokens) - 1 - length]:
            length += 1
        if length >= SHORTEST and length > best[1]:
            best = (at, length)
    return best


repetitive = st.one_of(
    st.lists(st.integers(0, 2), max_size=120),
    st.builds(lambda a, b, c: a * 3 + b + a * 2 + c + b, *[st.lists(st.integers(0, 50), max_size=20)] * 3),
)


@given(repetitive, repetitive, st.integers(0, 200), st.integers(0, 200))
def test_the_longest_match_the_latest_of_equals(before: list[int], tokens: list[int], common: int, first: int) -> None:
    tokens = before[:common] + tokens  # a timeline that goes back, and on in another way
    first = min(first, len(tokens))
    expected = [brute_force(tokens[: i + 1]) for i in range(first, len(tokens))]
    assert matches(tokens, first=first, before=before) == expected


def test_a_match_is_held_though_more_positions_begin_alike_than_are_looked_at() -> None:
    rng = np.random.default_rng(1)
    quoted = [*rng.integers(10, 1000, 8).tolist(), 1, 2, 3, *rng.integers(10, 1000, 50).tolist()]
    frequent = [token for i in range(2000) for token in (1, 2, 3, 1000 + i)]
    tokens = [*quoted, *frequent, *quoted]
    found = matches(tokens, first=len(quoted) + len(frequent) + 7)
    assert found == [(i, min(i + 1, LONGEST)) for i in range(7, len(quoted))]
    # Where it begins with what is frequent, the latest of those must do until something rarer comes.
    found = matches([*quoted, *frequent, *quoted[8:]], first=len(quoted) + len(frequent) + 2)
    assert found[0][0] > len(quoted)
    assert found[3:] == [(i, min(i - 7, LONGEST)) for i in range(13, len(quoted))]


def test_bad_arguments() -> None:
    null, at, length = ffi.NULL, ffi.new("int64_t[4]"), ffi.new("int32_t[4]")
    for arguments in [
        (null, 1, [1, 2], 2, 0, at, length),
        (null, 0, null, 2, 0, at, length),
        (null, 0, [1, 2], 2, 3, at, length),
        (null, 0, [1, 2], 2, -1, at, length),
        (null, 0, [1, 2], 2**40, 0, at, length),
        (null, -1, [1, 2], 2, 0, at, length),
        (null, 0, [1, 2], 2, 0, null, length),
    ]:
        assert lib.pf_copy_matches(*arguments) == lib.PF_ERR_ARGUMENT
    assert lib.pf_copy_matches(null, 0, null, 0, 0, null, null) == lib.PF_OK


# ---- in the session ----------------------------------------------------------------------------------------------


class Step(NamedTuple):
    ids: list[int]
    max_depth: int
    n_copied: int


class Copying(Core):
    """A session of the core that tells what each step did."""

    def steps(self, n: int) -> list[Step]:
        """Steps until there are n tokens."""
        out: list[Step] = []
        step = ffi.new("pf_step_result *", {"size": ffi.sizeof("pf_step_result")})
        while (left := n - len(ids_of(out))) > 0:
            check(lib.pf_session_step(self.session, left, step))
            check(lib.pf_session_commit(self.session, step.n_tokens, ffi.NULL))
            out.append(Step(list(step.tokens[0 : step.n_tokens]), step.max_depth, step.n_copied))
        return out

    def run(self, prompt: list[int], n: int = 64, *, budget: int = 16, **settings: Any) -> list[Step]:
        self.reset()
        self.configure(budget=budget, **settings)
        self.append(prompt)
        return self.steps(n)


def ids_of(steps: list[Step]) -> list[int]:
    return [token for step in steps for token in step.ids]


@pytest.fixture(scope="module")
def open_core(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Copying]]:
    target = to_f32(models.target_path(), tmp_path_factory.mktemp("f32") / "target.gguf")
    pair = Models(target, draft_file(models.draft_path()), "cpu")
    opened: list[Copying] = []

    def open_one() -> Copying:
        opened.append(Copying(pair, n_ctx=1024, n_batch=512))
        return opened[-1]

    yield open_one
    for core in opened:
        core.handles.free()


@pytest.fixture(scope="module")
def core(open_core: Callable[[], Copying]) -> Copying:
    return open_core()


@pytest.fixture(scope="module")
def quoting(core: Copying) -> list[list[int]]:
    """Prompts that the pair goes on from as it did before: one of its texts, and how that began."""
    tokenizer = pydflash.Tokenizer.from_gguf(models.target_path())
    texts = json.loads((Path(__file__).parent / "data" / "heldout_prompts.json").read_text())["prompts"]
    prompts = []
    for text in (texts[0]["text"], texts[42]["text"], texts[48]["text"]):
        begin = tokenizer.encode(text)
        prompts.append(begin + ids_of(core.run(begin, 96)) + tokenizer.encode("\n\n\n") + begin)
    return prompts


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.3, "top_p": 0.95, "seed": 5}], ids=["greedy", "sampled"])
def test_copying_changes_the_speed_and_never_the_text(
    core: Copying, quoting: list[list[int]], sampling: dict[str, Any]
) -> None:
    n_copied = deepest = 0
    for prompt in quoting:
        plain = ids_of(core.run(prompt, budget=0, **sampling))
        for settings in ({"budget": 16}, {"budget": 40}, {"budget": 15, "chain": True}):
            steps = core.run(prompt, **settings, **sampling)
            assert ids_of(steps) == plain
            n_copied += sum(step.n_copied for step in steps)
            deepest = max(deepest, *(len(step.ids) - 1 for step in steps))
    assert n_copied > 100  # or nothing was tested
    assert deepest > BLOCK  # as long as only a line can be


def test_copying_can_be_turned_off_and_then_takes_more_passes(core: Copying, quoting: list[list[int]]) -> None:
    n_steps = [0, 0]
    for prompt in quoting:
        copied, drafted = core.run(prompt), core.run(prompt, copying=False)
        assert ids_of(copied) == ids_of(drafted)
        assert all(step.n_copied == 0 and step.max_depth < BLOCK for step in drafted)
        assert all(step.n_copied < len(step.ids) for step in copied)
        n_steps = [n_steps[0] + len(copied), n_steps[1] + len(drafted)]
    assert n_steps[0] < 0.8 * n_steps[1]


def test_the_timeline_that_is_searched_is_the_one_that_stands(
    open_core: Callable[[], Copying], core: Copying, quoting: list[list[int]]
) -> None:
    """Gone back, restored or copied: the steps are those of a session that was given the tokens."""
    prompt = quoting[0]
    expected = core.run(prompt, 32)
    assert sum(step.n_copied for step in expected) > 0

    core.reset()
    core.append([*prompt[:100], 1])  # 100 committed, one pending
    state = core.state()
    core.append(prompt[50:150] * 3)
    core.rewind(100, state)
    core.append(prompt[100:])
    assert core.steps(32) == expected

    core.reset()
    core.append([*prompt[:-1], 1])
    state, rows = core.state(), core.kv()
    core.reset()
    for tensor, kv in enumerate(rows):
        core.set_kv(tensor, 0, len(prompt) - 1, kv)
    core.restore(prompt[:-1], state)
    core.append(prompt[-1:])
    assert core.steps(32) == expected

    core.reset()
    core.append(prompt)
    other = open_core()
    other.copy(core)
    assert other.steps(32) == expected
