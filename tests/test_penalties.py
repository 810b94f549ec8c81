"""Bias, penalties, log-probabilities: against float64 numpy from the definitions, and in trees as in plain decoding."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pydflash
from pydflash import Session, options
from pydflash._lib import check, ffi, lib
from tests.core_steps import DEFAULTS, logprobs, say
from tests.tiny_models import TinyDraft, TinyTarget

EVERYTHING: dict[str, Any] = {
    "repeat_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.15,
    "logit_bias": {3: 2.0, 7: -math.inf, 100: -1.5},
}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.02}


# ---- the definitions ---------------------------------------------------------------------------------------------


def expected_logits(
    logits: Any,
    prompt: list[int],
    output: list[int],
    *,
    repeat_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: dict[int, float] | None = None,
) -> Any:
    """In float64: bias; Keskar et al.'s penalty with Hugging Face's sign, over all; OpenAI's two, over the output."""
    shaped = np.asarray(logits, np.float32).astype(np.float64)
    for token, bias in (logit_bias or {}).items():
        shaped[token] += bias
    for token in {*prompt, *output}:
        shaped[token] *= repeat_penalty if shaped[token] < 0 else 1 / repeat_penalty
    for token, count in Counter(output).items():
        shaped[token] -= count * frequency_penalty + (count > 0) * presence_penalty
    return shaped


def log_softmax(logits: Any) -> Any:
    shifted = np.asarray(logits, np.float64) - np.max(logits)
    return shifted - math.log(np.exp(shifted).sum())


def probabilities(logits: Any, prompt: list[int], output: list[int], **given: Any) -> Any:
    row = np.ascontiguousarray(logits, np.float32)
    out = np.full(len(row), np.nan)
    params, _arrays = options.generate_params(budget=0, chain=False, **{**DEFAULTS, "temperature": 1.0, **given})
    ids = prompt + output
    check(
        lib.pf_sample_probs(
            ffi.from_buffer("float[]", row),
            len(row),
            params,
            ids,
            len(ids),
            len(output),
            ffi.from_buffer("double[]", out),
        )
    )
    return out


N_VOCAB = 50
IDS = st.lists(st.integers(0, N_VOCAB - 1), max_size=60)


@settings(max_examples=150)
@given(
    prompt=IDS,
    output=IDS,
    repeat_penalty=st.sampled_from([1.0, 0.7, 1.2, 5.0]),
    presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.3, -0.1, 2.0]),
    logit_bias=st.dictionaries(
        st.integers(0, N_VOCAB - 1), st.sampled_from([-math.inf, -100.0, -1.0, 3.0]), max_size=20
    ),
)
def test_the_distribution_from_the_definitions(prompt: list[int], output: list[int], **given: Any) -> None:
    logits = np.random.default_rng(len(prompt)).normal(0, 3, N_VOCAB).astype(np.float32)
    expected = np.exp(log_softmax(expected_logits(logits, prompt, output, **given)))
    np.testing.assert_allclose(probabilities(logits, prompt, output, **given), expected, rtol=2e-5, atol=1e-7)


def test_repetition_as_hugging_face_has_it() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(0)
    for penalty in (0.5, 1.1, 1.9):
        logits = rng.normal(0, 4, 300).astype(np.float32)
        logits[5] = 0
        ids = rng.integers(0, 300, 80).tolist()
        theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), torch.tensor(logits)[None])
        np.testing.assert_allclose(
            probabilities(logits, ids[:50], ids[50:], repeat_penalty=penalty),
            torch.softmax(theirs[0].double(), -1).numpy(),
            rtol=2e-5,
            atol=1e-7,
        )


def test_filters_see_what_bias_and_penalties_left() -> None:
    logits = np.array([5.0, 4.0, 3.0, -1.0], np.float32)
    assert probabilities(logits, [0], [], repeat_penalty=10.0, top_k=1).tolist() == [0, 1, 0, 0]
    assert probabilities(logits, [], [0, 1], presence_penalty=50.0, temperature=0.0).tolist() == [0, 0, 1, 0]
    assert probabilities(logits, [], [], logit_bias={3: 20.0}, top_p=0.5).tolist() == [0, 0, 0, 1]
    # What was given does not count as output.
    assert probabilities(logits, [0], [], presence_penalty=50.0, temperature=0.0).tolist() == [1, 0, 0, 0]


def test_large_numbers_stay_numbers() -> None:
    logits = np.array([3e38, -3e38, 0.0, 1.0], np.float32)
    assert probabilities(logits, [0, 1], [0, 1], repeat_penalty=0.01, frequency_penalty=-100.0)[0] == 1
    assert probabilities(logits, [], [], logit_bias={0: 1000.0, 1: -1000.0}).tolist() == [1, 0, 0, 0]


# ---- in a session ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """A random pair on F32 and an f32 cache, so that paths agree to the token."""
    folder = tmp_path_factory.mktemp("exact")
    target = TinyTarget()
    with Session(
        target.write(folder / "target.gguf", tokenizer=True),
        TinyDraft.of(target).write(folder / "draft.gguf"),
        kv_type="f32",
        n_ctx=256,
        n_threads=1,
    ) as session:
        yield session


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_each_token_is_the_definitions_choice(exact: Session, sampling: dict[str, Any]) -> None:
    """Step by step against numpy on the model's own logits: greedy the largest, sampled one of those that are kept."""
    prompt = [10, 11, 12, 10, 200, 3]
    said = say(exact, prompt, 60, logprobs=5, **EVERYTHING, **sampling)
    rows = exact.logits(prompt + said.ids)[len(prompt) - 1 : -1]
    assert len(said.logp) == len(said.ids) == 60
    assert 7 not in said.ids
    for i, (row, token) in enumerate(zip(rows, said.ids, strict=True)):
        shaped = expected_logits(row, prompt, said.ids[:i], **EVERYTHING)
        if sampling:
            assert shaped[token] > np.sort(shaped)[-41]
        else:
            assert shaped.max() - shaped[token] < 1e-4
        # Log-probabilities are the model's own.
        logp = log_softmax(row)
        assert said.logp[i] == pytest.approx(logp[token], abs=1e-4)
        np.testing.assert_allclose(said.top_logp[i], np.sort(logp)[::-1][:5], atol=1e-4)
        np.testing.assert_allclose(logp[said.top_ids[i]], said.top_logp[i], atol=1e-4)
        assert len(set(said.top_ids[i])) == 5


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_tree_chain_and_plain_say_the_same(agreeing_pair: tuple[Path, Path], sampling: dict[str, Any]) -> None:
    """On a pair whose trees are partly accepted, with the penalties changing what is said on the way to a node."""
    bias = {64: 0.3, 66: 0.2, 65: -0.1, 70: 1.0}
    penalties = {"repeat_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.02, "logit_bias": bias}
    with Session(*agreeing_pair, kv_type="f32", n_ctx=256, n_threads=1) as session:
        n_steps = 0
        for seed in range(12):
            settings = {**penalties, **sampling, "seed": seed, "logprobs": 3}
            prompt = [64 + seed % 4, 65, 1 + seed]
            plain = say(session, prompt, 80, budget=0, **settings)
            assert plain.n_steps == 80
            keep = np.random.default_rng(seed)
            runs = [
                say(session, prompt, 80, budget=16, **settings),
                say(session, prompt, 80, budget=63, **settings),
                say(session, prompt, 80, budget=3, chain=True, **settings),
                say(session, prompt, 80, keep=lambda n, keep=keep: int(keep.integers(1, n + 1)), **settings),
            ]
            for run in runs:
                assert run.ids == plain.ids
                np.testing.assert_allclose(run.logp, plain.logp, atol=1e-5)
                np.testing.assert_allclose(run.top_logp, plain.top_logp, atol=1e-5)
            n_steps += runs[0].n_steps
            # The penalties were at work: without them the text is another.
            assert say(session, prompt, 80, budget=16, **{**sampling, "seed": seed}).ids != plain.ids
        assert n_steps < 12 * 80 * 0.9  # and so was the tree


def test_random_pairs_say_the_same(exact: Session) -> None:
    rng = np.random.default_rng(1)
    for seed in range(6):
        prompt = rng.integers(0, exact.n_vocab, 20).tolist()
        given = {**EVERYTHING, **(SAMPLED if seed % 2 else {}), "seed": seed}
        plain = say(exact, prompt, 60, budget=0, **given).ids
        assert say(exact, prompt, 60, budget=12, **given).ids == plain
        assert say(exact, prompt, 60, budget=4, chain=True, **given).ids == plain


def test_the_output_begins_after_the_last_append(exact: Session) -> None:
    """Presence counts what was said since: an appended copy of what was said is a prompt like any other."""
    prompt = [5, 6, 7, 8]
    given = {"presence_penalty": 3.0, "frequency_penalty": 0.5}
    first = say(exact, prompt, 30, **given).ids
    core = exact._core.session
    check(lib.pf_session_append(core, [9], 1))
    step = ffi.new("pf_step_result *", {"size": ffi.sizeof("pf_step_result")})
    then: list[int] = []
    while len(then) < 30:
        check(lib.pf_session_step(core, 30 - len(then), step))
        then += list(step.tokens[0 : step.n_tokens])
        check(lib.pf_session_commit(core, step.n_tokens, ffi.NULL))
    assert then == say(exact, [*prompt, *first, 9], 30, **given).ids


def test_logprobs_change_nothing_that_is_said(tiny_session: Session) -> None:
    prompt = [1, 2, 3]
    for sampling in ({}, {**SAMPLED, "seed": 4}):
        plain = say(tiny_session, prompt, 40, **sampling)
        assert plain.logp == []
        for n in (0, 1, 20):
            said = say(tiny_session, prompt, 40, logprobs=n, **sampling)
            assert said.ids == plain.ids
            assert np.shape(said.top_ids) == (40, n)


def test_logprobs_not_asked_for(tiny_session: Session) -> None:
    say(tiny_session, [1, 2], 4)
    with pytest.raises(pydflash.StateError, match="n_logprobs"):
        logprobs(tiny_session, 4, 1)


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"repeat_penalty": 0.0}, "repeat_penalty is 0.0"),
        ({"repeat_penalty": math.nan}, "repeat_penalty is nan"),
        ({"presence_penalty": 101}, "presence_penalty is 101"),
        ({"frequency_penalty": "much"}, "frequency_penalty is 'much'"),
        ({"logit_bias": [1, 2]}, "not a mapping"),
        ({"logit_bias": {-1: 1.0}}, "-1"),
        ({"logit_bias": {"a": 1.0}}, "'a'"),
        ({"logit_bias": {1: math.inf}}, r"logit_bias\[1\] is inf"),
        ({"logit_bias": {1: math.nan}}, r"logit_bias\[1\] is nan"),
        ({"logit_bias": {1: None}}, r"logit_bias\[1\] is None"),
        ({"logit_bias": {99999: 1.0}}, "token 99999 is not in the vocabulary"),
        ({"logit_bias": dict.fromkeys(range(288), -math.inf)}, "forbids every token"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"logprobs": True}, "logprobs is True"),
    ],
    ids=str,
)
def test_settings_out_of_range(tiny_session: Session, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(pydflash.ArgumentError, match=sentence):
        say(tiny_session, [1], 1, **given)


def test_the_core_checks_for_itself(tiny_session: Session) -> None:
    core, params = tiny_session._core.session, ffi.new("pf_generate_params *")
    for field, value, word in (
        ("repeat_penalty", 0.0, "repeat_penalty"),
        ("repeat_penalty", math.nan, "repeat_penalty"),
        ("presence_penalty", math.inf, "presence_penalty"),
        ("frequency_penalty", -1e9, "frequency_penalty"),
        ("n_logprobs", 21, "n_logprobs"),
        ("n_logprobs", -2, "n_logprobs"),
        ("n_bias", 3, "n_bias"),
    ):
        lib.pf_generate_params_default(params)
        setattr(params, field, value)
        assert lib.pf_session_configure(core, params) == lib.PF_ERR_ARGUMENT
        assert word in ffi.string(lib.pf_last_error()).decode()
    lib.pf_generate_params_default(params)
    ids, bias = ffi.new("int32_t[]", [4, 2, 4]), ffi.new("float[]", [1, 2, 3])
    params.bias_ids, params.bias, params.n_bias = ids, bias, 3
    assert lib.pf_session_configure(core, params) == lib.PF_ERR_ARGUMENT
    assert "token 4 is named twice" in ffi.string(lib.pf_last_error()).decode()


def test_a_row_of_which_nothing_is_left() -> None:
    logits = np.full(20, -np.inf, np.float32)
    logits[3] = 1.0
    with pytest.raises(pydflash.ArgumentError, match="logit_bias"):
        probabilities(logits, [], [], logit_bias={3: -math.inf})
