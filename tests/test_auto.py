"""budget="auto": what it says is what plain decoding says, what it promises comes true, and what it learns is kept."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydflash
from pydflash import Session, models
from pydflash._lib import ffi, lib
from tests.tiny_models import to_f32

PROMPTS = [p["text"] for p in json.loads((Path(__file__).parent / "data/heldout_prompts.json").read_text())["prompts"]]
GREEDY: dict[str, Any] = {"max_tokens": 48, "ignore_eos": True}


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session(kv_type="f32", n_ctx=2048, n_threads=1) as session:
        yield session


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 5}, {"repeat_penalty": 1.3}])
def test_says_what_plain_decoding_says(tiny_session: Session, settings: dict[str, Any]) -> None:
    for prompt in ("abc", "a b c a b c a b"):
        plain = tiny_session.generate(prompt, budget=0, max_tokens=60, ignore_eos=True, **settings)
        auto = tiny_session.generate(prompt, budget="auto", max_tokens=60, ignore_eos=True, **settings)
        assert auto.ids == plain.ids
        assert plain.stats.n_drafted == 0


def test_is_the_default(session: Session) -> None:
    assert session.plan.budget == 63
    prompt = "import os\nimport sys\n\nclass Reader:\n    def __init__(self, path):\n"
    result = session.generate(prompt, max_tokens=200, ignore_eos=True)
    assert result.mean_accepted > 2  # it soon repeats itself: copying that pays everywhere
    assert result.ids == session.generate(prompt, budget=0, max_tokens=200, ignore_eos=True).ids


def test_trees_keep_what_they_promise() -> None:
    """Within a twentieth, on prompts that nothing was learned from, where drafts are taken to cost nothing and passes
    over trees half of a plain one, so that nearly every step drafts. Nothing is copied: a loop of one prompt would say
    more than all the rest."""
    promised, kept, drafted, steps = [], [], 0, 0
    with Session(kv_type="f32", n_ctx=2048, n_threads=1, copying=False) as session:
        for i, prompt in enumerate([*PROMPTS[1:61:2], *PROMPTS[61::2]]):
            believe(session, passes=[100.0, *[50.0] * 11], drafts=1e-3)
            stats = session.generate(prompt, budget="auto", **GREEDY).stats
            if i >= 30:
                assert stats.n_drafted > 3 * stats.n_steps
                drafted, steps = drafted + stats.n_drafted, steps + stats.n_steps
                promised.append(stats.mean_expected * stats.n_steps)
                kept.append(stats.n_generated)
    assert drafted > 5 * steps
    assert abs(sum(promised) - sum(kept)) < 0.05 * sum(kept)


def test_costs_are_measured_where_the_session_stands(session: Session) -> None:
    session.reset()
    with pytest.raises(pydflash.StateError, match="holds no tokens"):
        session.costs()
    session.append(PROMPTS[0])
    tokens = session.tokens
    costs = session.costs()
    assert list(costs.pass_ms) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert all(ms > 0 for ms in costs.pass_ms.values())
    assert costs.pass_ms[64] > costs.pass_ms[1] == min(costs.pass_ms.values())
    assert costs.draft_ms is not None
    assert costs.draft_ms > 0
    assert session.tokens == tokens
    assert session.generate(None, budget=0, **GREEDY).ids == session.generate(tokens, budget=0, **GREEDY).ids


def test_costs_that_no_longer_hold_are_put_right(session: Session) -> None:
    """A plain pass kept as the dearest of all would else never be tried again."""
    before = experience(session)
    believe(session, passes=[100.0, *[1e-2] * 11], drafts=1e-2)
    session.generate(PROMPTS[3], max_tokens=100, ignore_eos=True, budget="auto")
    assert session.costs().pass_ms[1] < 10
    assert lib.pf_session_set_experience(session._core.session, before, len(before)) == lib.PF_OK


def test_no_pass_is_taken_to_be_shorter_than_a_plain_one(session: Session) -> None:
    """Else a drafter that is never right would seem to pay."""
    before = experience(session)
    believe(session, passes=[100.0, *[1.0] * 11], drafts=1e-2)
    session.reset()
    session.append(PROMPTS[0])
    costs = session.costs()
    assert set(costs.pass_ms.values()) == {100.0}
    assert lib.pf_session_set_experience(session._core.session, before, len(before)) == lib.PF_OK


def test_costs_go_along_with_plain_passes(session: Session) -> None:
    """Up in step; down by no more than plain passes have become shorter."""
    before = experience(session)
    sizes = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64])
    for plain in (1e-3, 50.0):
        believe(session, passes=plain * sizes, drafts=1e3)
        session.generate(PROMPTS[3], max_tokens=200, ignore_eos=True, budget="auto")
        costs = session.costs().pass_ms
        if plain < costs[1]:
            assert costs[64] > 10 * costs[1]
        else:
            assert 50 * 63 < costs[64] < 50 * 64
    assert lib.pf_session_set_experience(session._core.session, before, len(before)) == lib.PF_OK


def test_a_drafter_that_is_never_right_is_hardly_asked(session: Session, tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    shutil.copytree(models.draft_path(), draft)
    weights = bytearray((draft / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(weights[:8], "little")
    noise = np.random.default_rng(1).normal(0, 0.05, (len(weights) - start) // 2).astype(np.float32)
    weights[start:] = (noise.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # bfloat16
    (draft / "model.safetensors").write_bytes(weights)
    target = to_f32(models.target_path(), tmp_path / "target.gguf")  # so that passes of all sizes agree
    with Session(target, draft, kv_type="f32", n_ctx=2048, n_threads=1, copying=False) as noisy:
        settings: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True}
        noisy.generate(PROMPTS[0], **settings)
        result = noisy.generate(PROMPTS[1], **settings)
        assert result.ids == noisy.generate(PROMPTS[1], budget=0, **settings).ids
        assert result.stats.ms["draft"] < 0.03 * sum(result.stats.ms.values())


# ---- what is learned -------------------------------------------------------------------------------------------------


def experience(session: Session) -> bytes:
    n = lib.pf_session_experience_bytes()
    out = ffi.new("char[]", n)
    assert lib.pf_session_get_experience(session._core.session, out, n) == lib.PF_OK
    return bytes(ffi.buffer(out))


def believe(session: Session, passes: Any, drafts: Any, n_seen: int = 16) -> None:
    """Makes the session believe that passes and drafts of all sizes take so many milliseconds, at every depth."""
    values = np.frombuffer(experience(session), np.float64).copy()
    costs = values[1 : 1 + 10 * 43].reshape(10, 43)  # measured up to; of 12 passes and 3 drafts: ms, ms of a plain pass
    costs[:, 0] = 64 if np.any(passes) else 0
    of_passes = costs[:, 1:37].reshape(10, 12, 3)  # then; and how often it was seen
    of_passes[..., 0], of_passes[..., 1], of_passes[..., 2] = passes, np.ravel(passes)[0], n_seen
    costs[:, 37::2], costs[:, 38::2] = drafts, np.ravel(passes)[0]
    assert lib.pf_session_set_experience(session._core.session, values.tobytes(), values.nbytes) == lib.PF_OK


def test_the_next_session_knows_what_this_one_learned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    draft = models.draft_path()
    options: dict[str, Any] = {"kv_type": "f16", "n_ctx": 1024, "n_threads": 1}
    with Session(**options) as first:
        nothing = experience(first)
        first.generate(PROMPTS[0], budget=16, **GREEDY)
        first.generate(PROMPTS[0], budget="auto", **GREEDY)
        known = experience(first)
    assert known != nothing
    with Session(**options) as second:
        assert experience(second) == known
    with Session(models.target_path(), draft, **options | {"kv_type": "q8_0"}) as other:
        assert experience(other) == nothing  # of other settings nothing is known
    (entry,) = (tmp_path / "pydflash" / "speed").iterdir()
    for broken in (b"", known[:-1], b"\xff" * len(known), bytes(len(known))):
        entry.write_bytes(broken)
        with Session(**options) as third:
            assert experience(third) == nothing


def test_a_larger_session_measures_what_a_smaller_one_could_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def known(session: Session) -> Any:
        row = np.frombuffer(experience(session), np.float64)[1 : 1 + 43]
        return row[0], np.count_nonzero(row[37::2])  # the largest pass, drafts

    with Session(kv_type="f16", n_ctx=1024, n_threads=1, budget=3) as small:
        small.generate(PROMPTS[0], max_tokens=4, budget="auto")
        assert known(small) == (4, 1)
    with Session(kv_type="f16", n_ctx=1024, n_threads=1) as large:
        assert known(large) == (4, 1)
        large.generate(PROMPTS[0], max_tokens=4)
        assert known(large) == (64, 3)


def test_a_cache_that_cannot_be_written_is_no_matter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    draft = models.target_path()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with Session(draft, kv_type="f16", n_ctx=512, n_threads=1) as session:
        assert session.generate("def f(", max_tokens=4).ids


def test_experience_that_cannot_be_is_refused(session: Session) -> None:
    good = np.frombuffer(experience(session), np.float64)
    for i in range(len(good)):
        for wrong in (np.nan, np.inf, -1e300):
            values = good.copy()
            values[i] = wrong
            status = lib.pf_session_set_experience(session._core.session, values.tobytes(), values.nbytes)
            if status == lib.PF_OK:  # what it changes can be anything: a draft that was never timed, a covariance
                session.generate("a b c", max_tokens=2, budget="auto")
            else:
                assert status == lib.PF_ERR_FORMAT
    assert lib.pf_session_set_experience(session._core.session, good.tobytes(), good.nbytes) == lib.PF_OK
    assert lib.pf_session_set_experience(session._core.session, struct.pack("d", 1.0), 8) == lib.PF_ERR_FORMAT


# ---- a line of one's own ---------------------------------------------------------------------------------------------


def test_a_proposed_line_is_accepted_as_far_as_it_is_right(session: Session) -> None:
    said = session.generate(PROMPTS[2], budget=0, **GREEDY).ids
    core = session._core.session
    session.rewind(0)
    session.append(PROMPTS[2])
    start = session.n_tokens
    step = ffi.new("pf_step_result *", {"size": ffi.sizeof("pf_step_result")})
    session.generate(None, budget=15, max_tokens=1)
    session.rewind(start)
    for right in (6, 3):
        done = session.n_tokens - start
        wrong = (said[done + right] + 1) % session.n_vocab
        assert lib.pf_session_propose(core, [*said[done : done + right], wrong], right + 1) == lib.PF_OK
        assert lib.pf_session_step(core, 64, step) == lib.PF_OK
        assert ffi.unpack(step.tokens, step.n_tokens)[: right + 1] == said[done : done + right + 1]
        assert lib.pf_session_commit(core, right + 1, ffi.NULL) == lib.PF_OK
    assert lib.pf_session_propose(core, [session.n_vocab], 1) == lib.PF_ERR_ARGUMENT
    assert lib.pf_session_propose(core, [0] * 64, 64) == lib.PF_ERR_ARGUMENT


def test_a_budget_is_a_number_or_auto(session: Session) -> None:
    with pytest.raises(pydflash.ArgumentError, match="budget is 'much'; it must be 'auto', or an integer from 0 to 63"):
        session.generate("a", budget="much")
    with pytest.raises(pydflash.ArgumentError, match="budget"):
        Session(budget="fast")
