"""The core's timeline: going back, keeping, moving and copying it, held to sessions that were never touched.

Sessions are compared by what they say next and by every byte they remember (KV rows and state), on random models with
and without a drafter and on the pair that ships.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pydflash import errors, models, options
from pydflash._handles import Handles, Models, draft_file
from pydflash._lib import check, ffi, lib
from tests.tiny_models import TinyDraft, TinyTarget

RNG = np.random.default_rng(4)
PROMPT = [int(i) for i in RNG.integers(0, 288, 150)]
MORE = [int(i) for i in RNG.integers(0, 288, 40)]


class Core:
    """One session of the core."""

    def __init__(self, pair: Models, **fields: Any) -> None:
        given = {"n_ctx": 400, "kv_type": "f32", "n_batch": 64, "n_ring": 4096, "n_threads": 1, "budget": 8}
        self.handles = Handles(pair, options.session_params(**{**given, **fields}))
        self.session = self.handles.session
        self.configure()

    def configure(self, **fields: Any) -> None:
        given = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 0, "chain": False, "stop_ids": []}
        params, kept = options.generate_params(**{**given, "budget": 8, **fields})
        check(lib.pf_session_configure(self.session, params))
        del kept

    @property
    def n_committed(self) -> int:
        return int(lib.pf_session_n_committed(self.session))

    @property
    def tokens(self) -> list[int]:
        out = ffi.new("int32_t[]", lib.pf_session_n_tokens(self.session))
        check(lib.pf_session_get_tokens(self.session, 0, len(out), out))
        return list(out)

    def append(self, ids: list[int]) -> None:
        check(lib.pf_session_append(self.session, ids, len(ids)))

    def step(self, most: int) -> list[int]:
        """A step that is yet to be committed."""
        result = ffi.new("pf_step_result *", {"size": ffi.sizeof("pf_step_result")})
        check(lib.pf_session_step(self.session, most, result))
        return list(ffi.unpack(result.tokens, result.n_tokens))

    def say(self, n: int) -> list[int]:
        """The next n tokens, committed."""
        said: list[int] = []
        while len(said) < n:
            tokens = self.step(n - len(said))
            check(lib.pf_session_commit(self.session, len(tokens), ffi.NULL))
            said += tokens
        return said

    def reset(self) -> None:
        check(lib.pf_session_reset(self.session))

    def state(self) -> bytes:
        out = ffi.new("char[]", lib.pf_session_state_bytes(self.session, self.n_committed))
        check(lib.pf_session_get_state(self.session, out, len(out)))
        return bytes(ffi.buffer(out))

    def rewind(self, n: int, state: bytes) -> None:
        check(lib.pf_session_rewind(self.session, n, state or ffi.NULL, len(state)))

    def kv(self, first: int = 0) -> list[bytes]:
        """Rows of committed tokens from `first` on, of each cache tensor."""
        return [self.get_kv(i, first, self.n_committed - first) for i in range(lib.pf_session_n_kv(self.session))]

    def get_kv(self, tensor: int, first: int, n: int, *, n_bytes: int | None = None) -> bytes:
        row = lib.pf_session_kv_row_bytes(self.session, tensor)
        out = ffi.new("char[]", max(0, n) * row if n_bytes is None else n_bytes)
        check(lib.pf_session_get_kv(self.session, tensor, first, n, out, len(out)))
        return bytes(ffi.buffer(out))

    def set_kv(self, tensor: int, first: int, n: int, rows: bytes) -> None:
        check(lib.pf_session_set_kv(self.session, tensor, first, n, rows, len(rows)))

    def restore(self, ids: list[int], state: bytes) -> None:
        check(lib.pf_session_restore(self.session, ids, len(ids), state, len(state)))

    def copy(self, other: Core) -> None:
        check(lib.pf_session_copy(self.session, other.session))

    def all(self) -> tuple[list[int], bytes, list[bytes]]:
        """Everything it remembers."""
        return self.tokens, self.state(), self.kv()


Open = Callable[..., Core]


def opener(target: Path, draft: Path | None) -> Iterator[Open]:
    """Opens sessions on one pair of models, which live until the test is over."""
    pair = Models(target, draft, "cpu")
    opened: list[Core] = []

    def open_one(**fields: Any) -> Core:
        opened.append(Core(pair, **fields))
        return opened[-1]

    yield open_one
    for core in opened:
        core.handles.free()


@pytest.fixture(params=["plain", "drafted", "attention only", "shipped"])
def open_core(request: pytest.FixtureRequest, tmp_path: Path, agreeing_pair: tuple[Path, Path]) -> Iterator[Open]:
    if request.param == "plain":
        yield from opener(TinyTarget().write(tmp_path / "target.gguf"), None)
    elif request.param == "drafted":
        yield from opener(*agreeing_pair)
    elif request.param == "shipped":
        yield from opener(models.target_path(), draft_file(models.draft_path()))
    else:
        target = TinyTarget(n_layer=2, recurrent=(False, False))
        yield from opener(target.write(tmp_path / "target.gguf"), None)


@pytest.fixture
def open_drafted(tmp_path: Path) -> Iterator[Open]:
    target = TinyTarget()
    yield from opener(target.write(tmp_path / "target.gguf"), TinyDraft.of(target).write(tmp_path / "draft.gguf"))


# ---- what a timeline is ------------------------------------------------------------------------------------------


def test_tokens_are_kept(open_core: Open) -> None:
    core = open_core()
    assert (core.tokens, core.n_committed) == ([], 0)
    core.append(PROMPT)
    assert (core.tokens, core.n_committed) == (PROMPT, len(PROMPT) - 1)
    said = core.say(9)
    assert (core.tokens, core.n_committed) == (PROMPT + said, len(PROMPT) + 8)
    core.append(MORE)
    assert (core.tokens, core.n_committed) == (PROMPT + said + MORE, len(PROMPT + MORE) + 8)
    out = ffi.new("int32_t[]", 5)
    check(lib.pf_session_get_tokens(core.session, len(PROMPT) - 2, 5, out))
    assert list(out) == PROMPT[-2:] + said[:3]
    core.reset()
    assert core.tokens == []


def test_an_uncommitted_step_is_not_on_the_timeline(open_core: Open) -> None:
    core = open_core()
    core.append(PROMPT)
    said = core.step(8)
    assert core.tokens == PROMPT
    check(lib.pf_session_commit(core.session, 1, ffi.NULL))
    assert core.tokens == PROMPT + said[:1]


@pytest.mark.parametrize("edges", [[1], [65], [129], [1, 65, 129]])
def test_a_prompt_in_pieces_is_the_prompt(open_core: Open, edges: list[int]) -> None:
    """Pieces that end at multiples of n_batch, and one token more: the pending one."""
    whole, pieces = open_core(), open_core()
    whole.append(PROMPT)
    for start, end in pairwise([0, *edges, len(PROMPT)]):
        pieces.append(PROMPT[start:end])
    assert pieces.all() == whole.all()


def test_chunks_end_where_they_would_have_ended(open_core: Open) -> None:
    """A piece that ends anywhere costs one edge more; the chunks behind it are the ones of the whole prompt."""
    one, two = open_core(), open_core()
    for start, end in pairwise([0, 30, len(PROMPT)]):
        one.append(PROMPT[start:end])
    for start, end in pairwise([0, 30, 65, 129, len(PROMPT)]):
        two.append(PROMPT[start:end])
    assert one.all() == two.all()


# ---- back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_type", options.KV_TYPES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_back_and_on(open_core: Open, kv_type: str, temperature: float) -> None:
    core = open_core(kv_type=kv_type)
    core.configure(temperature=temperature, seed=3)
    core.append(PROMPT)
    n, state = core.n_committed, core.state()
    first = core.say(12)
    after = core.all()
    core.append(MORE)
    core.say(5)
    assert lib.pf_session_state_bytes(core.session, n) == len(state)
    core.rewind(n, state)
    assert (core.tokens, core.n_committed, core.state()) == (PROMPT[:n], n, state)
    core.append(PROMPT[n:])
    assert core.say(12) == first
    assert core.all() == after


@pytest.mark.parametrize("n_ring", [256, 4096])
def test_back_over_a_ring_that_has_moved_on(open_drafted: Open, n_ring: int) -> None:
    """The drafter's context comes back with the state: drafts after it are those of before, to the bit."""
    core = open_drafted(n_ring=n_ring, n_ctx=512)
    core.append(PROMPT)
    marks = [(core.n_committed, core.state())]
    for ids in (MORE, PROMPT, MORE, MORE):
        core.append(ids)
        marks.append((core.n_committed, core.state()))
    tokens = core.tokens
    assert core.n_committed > 256
    said = core.say(30)
    after = core.all()
    for n, state in reversed(marks):
        core.rewind(n, state)
        assert (core.n_committed, core.state()) == (n, state)
        edges = [n, *(mark + 1 for mark, _ in marks if mark >= n)]
        for start, end in pairwise(edges):  # the appends of before
            core.append(tokens[start:end])
        assert core.say(30) == said
        assert core.all() == after


def test_penalties_forget_what_is_no_longer_there(open_core: Open) -> None:
    core, other = open_core(), open_core()
    for each in (core, other):
        each.configure(repeat_penalty=2.0, frequency_penalty=1.0)
    core.append(PROMPT)
    n, state, kv = core.n_committed, core.state(), core.kv()
    first = core.say(20)
    core.append(MORE)
    core.rewind(n, state)
    core.append(PROMPT[n:])
    other.append(MORE)
    other.reset()
    for i, rows in enumerate(kv):
        other.set_kv(i, 0, n, rows)
    other.restore(PROMPT[:n], state)
    other.append(PROMPT[n:])
    assert core.say(20) == other.say(20) == first


def test_back_to_the_beginning(open_core: Open) -> None:
    core = open_core()
    core.append(PROMPT)
    first = core.say(5)
    core.rewind(0, b"")
    assert core.tokens == []
    core.append(PROMPT)
    assert core.say(5) == first


def test_nothing_pending_is_nothing_to_step_from(open_core: Open) -> None:
    core = open_core()
    core.append(PROMPT)
    core.rewind(core.n_committed, core.state())
    before = core.all()
    with pytest.raises(errors.StateError, match="nothing is pending; append at least one token"):
        core.step(1)
    assert core.all() == before


# ---- elsewhere ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0", "q4_0", ("q8_0", "q4_0")])
def test_a_timeline_goes_on_elsewhere(open_core: Open, kv_type: Any) -> None:
    here, there = open_core(kv_type=kv_type), open_core(kv_type=kv_type, n_ctx=300)
    here.append(PROMPT)
    here.say(7)
    tokens, state, kv = here.all()
    there.append(MORE)
    there.say(3)
    there.reset()
    for i, rows in enumerate(kv):  # in two pieces
        row = lib.pf_session_kv_row_bytes(there.session, i)
        there.set_kv(i, 0, 100, rows[: 100 * row])
        there.set_kv(i, 100, len(rows) // row - 100, rows[100 * row :])
    there.restore(tokens[:-1], state)
    assert there.all() == (tokens[:-1], state, kv)
    there.append(tokens[-1:])
    assert there.say(20) == here.say(20)
    assert there.all() == here.all()


@pytest.mark.parametrize("kv_type", ["f32", "q4_0"])
def test_a_copy_goes_its_own_way(open_core: Open, kv_type: str) -> None:
    here, there = open_core(kv_type=kv_type), open_core(kv_type=kv_type, n_ctx=300, budget=0)
    here.configure(temperature=1.0, seed=11, budget=20)
    here.append(PROMPT)
    here.say(4)
    before = here.all()
    there.copy(here)
    assert there.all() == here.all() == before
    ahead = there.say(15)  # settings came along
    there.append(MORE)
    assert here.all() == before
    assert here.say(15) == ahead
    here.copy(here)
    assert here.tokens == before[0] + ahead
    there.copy(here)
    assert there.all() == here.all()
    assert there.say(6) == here.say(6)
    here.reset()
    there.copy(here)
    assert there.tokens == []


# ---- what is refused ---------------------------------------------------------------------------------------------

ARGUMENT, STATE, MISMATCH, CONTEXT = (
    errors.ArgumentError,
    errors.StateError,
    errors.DraftMismatchError,
    errors.ContextFullError,
)


def test_wrong_arguments_leave_all_as_it_was(open_core: Open) -> None:
    core, empty = open_core(), open_core()
    core.append(PROMPT)
    n, state = core.n_committed, core.state()
    core.say(4)
    end, before = core.n_committed, core.all()
    tokens, now, kv = before
    ids, row = tokens[:end], len(kv[0]) // end
    n_kv = len(kv)

    wrong: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: core.rewind(-1, state), ARGUMENT, f"to -1 tokens, but the session has 0 to {end} committed"),
        (lambda: core.rewind(end + 1, now), ARGUMENT, f"to {end + 1} tokens"),
        (lambda: core.rewind(n, b""), ARGUMENT, f"the state has 0 bytes, but that of {n} committed tokens has"),
        (lambda: core.rewind(n, state[:-1]), ARGUMENT, f"the state has {len(state) - 1} bytes"),
        (lambda: core.rewind(n, bytes(len(state))), ARGUMENT, f"not that of these {n} tokens"),
        (lambda: core.restore(ids, now), STATE, f"restore: the session holds {end + 1} tokens; reset it first"),
        (lambda: core.set_kv(0, 0, 1, kv[0][:row]), STATE, "set_kv: the session holds"),
        (lambda: core.get_kv(n_kv, 0, 0), ARGUMENT, f"there is no cache tensor {n_kv}"),
        (lambda: core.get_kv(-1, 0, 0), ARGUMENT, "there is no cache tensor -1"),
        (lambda: core.get_kv(0, 0, end + 1), ARGUMENT, f"{end + 1} rows from 0 on, but there are {end}"),
        (lambda: core.get_kv(0, end, 1), ARGUMENT, f"1 rows from {end} on"),
        (lambda: core.get_kv(0, -1, 1), ARGUMENT, "1 rows from -1 on"),
        (lambda: core.get_kv(0, 0, -1, n_bytes=0), ARGUMENT, "-1 rows"),
        (lambda: core.get_kv(0, 2**62, 2**62, n_bytes=0), ARGUMENT, "rows from"),
        (lambda: core.get_kv(0, 0, 2, n_bytes=row), ARGUMENT, f"{row} bytes, but 2 rows of tensor 0 have {2 * row}"),
        (lambda: check(lib.pf_session_get_state(core.session, ffi.new("char[8]"), 8)), ARGUMENT, "room for 8 bytes"),
        (lambda: check(lib.pf_session_get_tokens(core.session, 0, end + 2, ffi.NULL)), ARGUMENT, "must not be null"),
        (lambda: get_tokens(core, 0, end + 2), ARGUMENT, f"but the session holds {end + 1}"),
        (lambda: get_tokens(core, -1, 1), ARGUMENT, "1 tokens from -1 on"),
        (lambda: get_tokens(core, 1, -1), ARGUMENT, "-1 tokens from 1 on"),
        (lambda: get_tokens(core, 2**62, 2**62), ARGUMENT, "tokens from"),
        (lambda: core.append([288 * 288 * 288]), ARGUMENT, "outside the vocabulary"),
    ]
    for call, kind, sentence in wrong:
        with pytest.raises(kind, match=sentence):
            call()
        assert core.all() == before, sentence

    short = open_core(n_ctx=64)
    long = [*ids, *MORE, *ids, *MORE, *ids]
    wrong = [
        (lambda: empty.restore(ids, now[:-8]), ARGUMENT, "the state has"),
        (lambda: empty.restore([*ids[:-1], ids[-1] ^ 1], now), ARGUMENT, "not that of these"),
        (lambda: empty.restore([*ids[:-1], -1], now), ARGUMENT, f"token -1 at index {end - 1}"),
        (lambda: empty.restore(long, now), CONTEXT, f"{len(long) - 400} too many"),
        (lambda: check(lib.pf_session_restore(empty.session, [0], -1, now, len(now))), ARGUMENT, "negative"),
        (lambda: check(lib.pf_session_restore(empty.session, ids, end, ffi.NULL, 0)), ARGUMENT, "the state has 0"),
        (lambda: empty.set_kv(0, 399, 2, kv[0][: 2 * row]), ARGUMENT, "2 rows from 399 on, but there are 400"),
        (lambda: empty.set_kv(0, 0, 2, kv[0][:row]), ARGUMENT, "2 rows of tensor 0"),
        (lambda: short.copy(core), CONTEXT, f"holds {end + 1} tokens, which do not fit into n_ctx 64"),
        (lambda: open_core(kv_type="f16").copy(core), MISMATCH, "different KV types"),
        (lambda: open_core(n_batch=128).copy(core), MISMATCH, "n_batch"),
    ]
    for call, kind, sentence in wrong:
        with pytest.raises(kind, match=sentence):
            call()
        assert (empty.tokens, short.tokens) == ([], [])
        assert core.all() == before
    core.rewind(n, state)  # and the right one still does


def get_tokens(core: Core, first: int, n: int) -> list[int]:
    out = ffi.new("int32_t[]", 1000)
    check(lib.pf_session_get_tokens(core.session, first, n, out))
    return list(out[0 : max(n, 0)])


def test_copies_of_other_models_are_refused(open_drafted: Open, tmp_path: Path) -> None:
    core = open_drafted()
    core.append(PROMPT)
    before = core.all()
    for other in opener(TinyTarget().write(tmp_path / "other.gguf"), None):
        stranger = other()
        stranger.append(MORE)
        for to, source in ((core, stranger), (stranger, core)):
            with pytest.raises(MISMATCH, match="different models"):
                to.copy(source)
        assert stranger.tokens == MORE
    assert core.all() == before


def test_a_step_must_be_committed_first(open_core: Open) -> None:
    core, other = open_core(), open_core()
    core.append(PROMPT)
    state = core.state()
    n = core.n_committed
    said = core.step(8)
    for call in (
        core.state,
        lambda: core.rewind(n, state),
        lambda: core.rewind(0, b""),
        lambda: core.get_kv(0, 0, 1),
        lambda: core.set_kv(0, 0, 0, b""),
        lambda: core.restore(PROMPT[:n], state),
        lambda: core.copy(other),
        lambda: other.copy(core),
        lambda: core.append([1]),
    ):
        with pytest.raises(STATE, match="the last step has not been committed"):
            call()
    check(lib.pf_session_commit(core.session, len(said), ffi.NULL))
    assert core.tokens == PROMPT + said
    core.rewind(n, state)
    core.append(PROMPT[n:])
    assert core.say(len(said)) == said


def test_no_session_is_no_crash() -> None:
    null = ffi.NULL
    assert lib.pf_session_n_committed(null) == 0
    assert lib.pf_session_state_bytes(null, 5) == 0
    assert lib.pf_session_n_kv(null) == 0
    assert lib.pf_session_kv_row_bytes(null, 0) == 0
    for status in (
        lib.pf_session_get_tokens(null, 0, 0, null),
        lib.pf_session_get_state(null, null, 0),
        lib.pf_session_rewind(null, 0, null, 0),
        lib.pf_session_get_kv(null, 0, 0, 0, null, 0),
        lib.pf_session_set_kv(null, 0, 0, 0, null, 0),
        lib.pf_session_restore(null, null, 0, null, 0),
        lib.pf_session_copy(null, null),
    ):
        assert status == lib.PF_ERR_ARGUMENT
