"""What Session promises its callers, on random models: options, stops, streams, threads, interrupts, figures.

That the tokens are the right ones is for other tests; here a plain run of the same session says what they should be.
"""

from __future__ import annotations

import gc
import hashlib
import signal
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pydflash
from pydflash import Session
from pydflash._text import TextStream
from pydflash.results import Tally
from tests.tiny_models import TinyDraft, TinyTarget

PROMPT = "the rest in one tree"
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 5, "ignore_eos": True}


# ---- generate and stream -----------------------------------------------------------------------------------------


def test_result(tiny_session: Session) -> None:
    result = tiny_session.generate(PROMPT, max_tokens=40, budget=16, **SAMPLED)
    stats = result.stats
    assert result.finish_reason == "length"
    assert len(result.ids) == stats.n_generated == 40
    assert result.text == tiny_session.detokenize(result.ids, skip_special=True)
    assert stats.n_prompt == len(tiny_session.tokenize(PROMPT))
    assert result.mean_accepted == stats.mean_accepted == 40 / stats.n_steps
    assert stats.output_hash == hashlib.sha256(struct.pack("<40i", *result.ids)).hexdigest()[:16]
    assert set(stats.ms) == {"draft", "build", "verify", "accept", "commit"}
    assert stats.prefill_tps > 0
    assert stats.decode_tps > 0
    assert stats.tree_used is not None
    assert 0 <= stats.tree_used <= 1
    assert all(0 <= share <= 1 for share in stats.accepted_by_depth)
    assert tiny_session.stats is stats
    assert tiny_session.n_tokens == stats.n_prompt + 40


def test_chunks_add_up_to_the_result(tiny_session: Session) -> None:
    whole = tiny_session.generate(PROMPT, max_tokens=50, **SAMPLED)
    chunks = list(tiny_session.stream(PROMPT, max_tokens=50, **SAMPLED))
    assert [token for chunk in chunks for token in chunk.ids] == whole.ids
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert all(chunk.accepted == len(chunk.ids) >= 1 for chunk in chunks)
    assert [chunk.result is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    last = chunks[-1].result
    assert last is not None
    assert (last.ids, last.text, last.seed) == (whole.ids, whole.text, 5)


def test_ids_as_prompt(tiny_session: Session) -> None:
    ids = tiny_session.tokenize(PROMPT)
    expected = tiny_session.generate(PROMPT, max_tokens=8).ids
    for prompt in (ids, tuple(ids), np.array(ids), np.array(ids, np.int32), iter(ids)):
        assert tiny_session.generate(prompt, max_tokens=8).ids == expected


def test_budgets_and_chains_say_the_same(tiny_session: Session) -> None:
    plain = tiny_session.generate(PROMPT, max_tokens=40, budget=0, **SAMPLED)
    assert plain.stats.n_steps == 40
    assert plain.stats.tree_used is None
    assert plain.stats.accepted_by_depth == []
    for options in ({"budget": 1}, {"budget": 63}, {"budget": 16, "chain": True}, {}):
        assert tiny_session.generate(PROMPT, max_tokens=40, **SAMPLED, **options).ids == plain.ids, options


def test_seeds(tiny_session: Session) -> None:
    first = tiny_session.generate(PROMPT, max_tokens=20, temperature=2.0)
    again = tiny_session.generate(PROMPT, max_tokens=20, temperature=2.0, seed=first.seed)
    other = tiny_session.generate(PROMPT, max_tokens=20, temperature=2.0)
    assert again.ids == first.ids
    assert other.seed != first.seed
    assert other.ids != first.ids
    assert tiny_session.generate(PROMPT, max_tokens=1, temperature=1.0, seed=2**64 - 1).seed == 2**64 - 1


def test_settings_of_the_session(tiny_target: Path, tiny_draft: Path) -> None:
    with Session(
        tiny_target, tiny_draft, budget=0, n_ctx=64, n_threads=1, n_batch=64, kv_type=("q8_0", "f16")
    ) as session:
        assert session.n_ctx == 64
        assert session.generate(PROMPT, max_tokens=9, ignore_eos=True).stats.n_steps == 9
    with Session(tiny_target, tiny_draft, chain=True, budget=3, n_threads=1) as session:
        assert len(session.generate(PROMPT, max_tokens=40, **SAMPLED).stats.accepted_by_depth) <= 3
    with Session(tiny_target, n_threads=1) as session:
        assert session.block_size == 0
        assert session.generate(PROMPT, max_tokens=9, ignore_eos=True).stats.n_steps == 9


def test_long_prompts_are_prefilled_in_batches(tiny_target: Path) -> None:
    ids = [int(i) for i in np.random.default_rng(0).integers(0, 256, 300)]
    expected = None
    for n_batch in (64, 128, 512):
        for n in (1, 2, 64, 65, 66, 129, 300):
            with Session(tiny_target, kv_type="f32", n_batch=n_batch, n_threads=1) as session:
                got = session.generate(ids[:n], max_tokens=6, ignore_eos=True)
                assert got.stats.n_prompt == n
        expected = expected or got.ids
        assert got.ids == expected


def test_the_context_ends_a_run(tiny_target: Path, tiny_draft: Path) -> None:
    with Session(tiny_target, tiny_draft, n_ctx=64, kv_type="f32", n_threads=1) as session:
        n_prompt = len(session.tokenize(PROMPT))
        for budget in (0, 16):
            result = session.generate(PROMPT, max_tokens=None, ignore_eos=True, budget=budget)
            assert result.finish_reason == "length"
            assert n_prompt + len(result.ids) == 64
        full = session.generate([1] * 63, max_tokens=5, ignore_eos=True)
        assert len(full.ids) == 1
        assert session.generate([1] * 64, max_tokens=0).ids == []


def test_no_tokens_wanted(tiny_session: Session) -> None:
    (chunk,) = tiny_session.stream(PROMPT, max_tokens=0)
    assert chunk.result is not None
    assert (chunk.text, chunk.ids, chunk.accepted, chunk.result.finish_reason) == ("", [], 0, "length")
    assert chunk.result.mean_accepted == 0.0


# ---- stops -------------------------------------------------------------------------------------------------------


def test_stop_tokens(tiny_session: Session) -> None:
    free = tiny_session.generate(PROMPT, max_tokens=40, **SAMPLED).ids
    for at in (0, 1, 7, 25):
        token = free[at]
        first = free.index(token)
        for options in ({}, {"budget": 0}, {"budget": 63}):
            result = tiny_session.generate(PROMPT, max_tokens=40, stop=token, **SAMPLED, **options)
            assert result.finish_reason == "stop"
            assert result.ids == free[: first + 1]
            assert result.text == tiny_session.detokenize(free[:first], skip_special=True)
            assert tiny_session.n_tokens == result.stats.n_prompt + first + 1


def test_the_models_own_end_tokens_stop(tiny_session: Session) -> None:
    assert tiny_session.tokenizer is not None
    ends = tiny_session.tokenizer.stop_ids
    assert ends == {285, 287}
    for seed in range(200):
        free = tiny_session.generate(PROMPT, max_tokens=60, temperature=3.0, seed=seed, ignore_eos=True, budget=0).ids
        found = [i for i, token in enumerate(free) if token in ends]
        if found:
            break
    result = tiny_session.generate(PROMPT, max_tokens=60, temperature=3.0, seed=seed)
    assert result.finish_reason == "stop"
    assert result.ids == free[: found[0] + 1]
    assert not result.text.endswith("|>")


def test_stop_strings_cut_text_and_ids(tiny_session: Session) -> None:
    free = tiny_session.generate(PROMPT, max_tokens=60, **SAMPLED)
    for start, length in ((0, 1), (3, 2), (10, 4), (len(free.text) // 2, 3)):
        stop = free.text[start : start + length]
        cut = free.text.index(stop)
        result = tiny_session.generate(PROMPT, max_tokens=60, stop=["never there", stop], **SAMPLED)
        assert result.finish_reason == "stop"
        assert result.text == free.text[:cut]
        # The ids are those up to where the string completes, and no further.
        assert result.ids == free.ids[: len(result.ids)]
        decode = tiny_session.detokenize
        assert stop in decode(result.ids, skip_special=True)
        assert stop not in decode(result.ids[:-1], skip_special=True)
        assert tiny_session.n_tokens == result.stats.n_prompt + len(result.ids)


def test_a_run_goes_on_after_a_stop_string_as_if_it_had_been_shorter(tiny_session: Session) -> None:
    """What follows the stop within its step never happened: the caches stand where the ids end."""
    free = tiny_session.generate(PROMPT, max_tokens=30, **SAMPLED)
    stopped = tiny_session.generate(PROMPT, max_tokens=30, stop=free.text[6:9], **SAMPLED)
    ids = tiny_session.tokenize(PROMPT) + stopped.ids
    rest = tiny_session.generate(ids, max_tokens=30 - len(stopped.ids), **SAMPLED)
    assert stopped.ids + rest.ids == free.ids


def test_stops_in_the_middle_of_an_accepted_path(agreeing_pair: tuple[Path, Path]) -> None:
    settings: dict[str, Any] = {"max_tokens": 60, "temperature": 1.0, "seed": 3}
    with Session(*agreeing_pair, kv_type="f32", budget=16, n_threads=1) as session:
        free = session.generate("a", **settings)
        assert free.mean_accepted > 2
        assert set(free.text) == set("abcd")
        assert session.generate("a", budget=0, **settings).ids == free.ids
        n_cut = 0
        for start in range(0, 40, 3):
            for stop in (free.text[start : start + 3], free.ids[start]):
                chunks = list(session.stream("a", stop=stop, **settings))
                result = chunks[-1].result
                assert result is not None
                assert result.finish_reason == "stop"
                if isinstance(stop, str):
                    cut = free.text.index(stop)
                    assert result.text == free.text[:cut]
                    assert result.ids == free.ids[: cut + 3]
                else:
                    assert result.ids == free.ids[: free.ids.index(stop) + 1]
                assert session.n_tokens == 1 + len(result.ids)  # nothing after the stop was committed
                assert all(chunk.text == "" or stop != chunk.text for chunk in chunks)
                n_cut += len(result.ids) < sum(_whole_steps(session, len(chunks), settings))
        assert n_cut > 5  # so that this has seen stops in the middle of a step


def _whole_steps(session: Session, n: int, settings: dict[str, Any]) -> list[int]:
    """How many tokens the first n steps commit when nothing stops them."""
    stream = session.stream("a", **settings)
    return [chunk.accepted for chunk, _ in zip(stream, range(n), strict=False)]


class OneCharacterTokens:
    """A tokenizer whose token i is the i-th byte: enough for TextStream."""

    n_vocab = 256

    def stream_decoder(self, *, skip_special: bool) -> Any:
        import codecs

        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        return SimpleNamespace(push=lambda i: utf8.decode(bytes([i])), flush=lambda: utf8.decode(b"", final=True))


def texts(pieces: list[bytes], stops: list[str]) -> tuple[list[str], int | None, str]:
    """What is given out piece by piece, where in the last piece a stop completed, and what finish adds."""
    stream = TextStream(OneCharacterTokens(), stops)  # type: ignore[arg-type]
    out = []
    for piece in pieces:
        text, n_kept = stream.push(piece)
        out.append(text)
        if n_kept is not None:
            return out, n_kept, ""
    return out, None, stream.finish()


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        ([b"ab", b"cd"], [], (["ab", "cd"], None, "")),
        ([b"a\xe2\x82", b"\xacb"], [], (["a", "€b"], None, "")),  # half a character waits
        ([b"a\xe2\x82"], [], (["a"], None, "\ufffd")),  # and is U+FFFD when nothing follows
        ([b"ab", b"cd"], ["bc"], (["a", ""], 1, "")),  # 'b' is held back until it is decided
        ([b"ab", b"xd"], ["bc"], (["a", "bxd"], None, "")),
        ([b"ab"], ["bc"], (["a"], None, "b")),
        ([b"aab"], ["ab"], (["a"], 3, "")),
        ([b"a", b"a", b"b"], ["aab"], (["", "", ""], 1, "")),
        ([b"abcabd"], ["abd", "c"], (["ab"], 3, "")),  # the one that completes first
        ([b"xabc"], ["abc", "bc"], (["x"], 4, "")),  # both complete at once: the one that begins first
        ([b"\xe2\x82", b"\xac!"], ["€"], (["", ""], 1, "")),
        ([b"one END two"], ["END"], (["one "], 7, "")),
    ],
)
def test_text_stream(pieces: list[bytes], stops: list[str], expected: tuple[list[str], int | None, str]) -> None:
    assert texts(pieces, stops) == expected


def test_text_without_a_tokenizer_is_empty() -> None:
    stream = TextStream(None)
    assert stream.push([1, 2, 3]) == ("", None)
    assert stream.finish() == ""


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temprature": 1.0}, "no option 'temprature', did you mean 'temperature'?"),
        ({"zzz": 1}, "it has sampling, temperature,"),
        ({"temperature": -1}, "temperature is -1; it must be a number from 0 to 100"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"budget": 64}, "budget is 64; it must be 'auto', or an integer from 0 to 63"),
        ({"budget": -1}, "budget is -1"),
        ({"stop": ""}, "empty string"),
        ({"stop": [999]}, r"stop\[0\] is 999, but the vocabulary has 288 tokens"),
        ({"stop": [1.5]}, "stop is"),
    ],
)
def test_wrong_run_options(options: dict[str, Any], sentence: str, tiny_session: Session) -> None:
    with pytest.raises(pydflash.ArgumentError, match=sentence):
        tiny_session.generate(PROMPT, **options)
    with pytest.raises(pydflash.ArgumentError, match=sentence):
        tiny_session.stream(PROMPT, **options)  # at once, not when the first chunk is asked for


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"n_contxt": 1}, "did you mean 'n_ctx'?"),
        ({"n_ctx": 0}, "n_ctx is 0"),
        ({"kv_type": "q8"}, "did you mean 'q8_0'?"),
        ({"kv_type": "q5_1"}, "kv_type is 'q5_1'"),
        ({"kv_type": ("f16",)}, "a pair of them"),
        ({"kv_type": 3}, "kv_type is 3"),
        ({"budget": 99}, "budget is 99"),
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"n_batch": 100}, "multiple of 64"),
        ({"n_batch": 8192}, "n_batch is 8192"),
        ({"n_threads": 0}, "n_threads is 0"),
        ({"n_ring": 0}, "n_ring is 0"),
    ],
)
def test_wrong_session_options(options: dict[str, Any], sentence: str, tiny_target: Path) -> None:
    with pytest.raises(pydflash.ArgumentError, match=sentence):
        Session(tiny_target, **options)


def test_unknown_options_are_type_errors_too(tiny_session: Session) -> None:
    with pytest.raises(TypeError):
        tiny_session.generate(PROMPT, temprature=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("prompt", "error", "sentence"),
    [
        ("", pydflash.ArgumentError, "the prompt is empty"),
        ([], pydflash.ArgumentError, "the prompt is empty"),
        ([0, 288], pydflash.ArgumentError, r"prompt\[1\] is 288, but the vocabulary has 288 tokens"),
        ([-1], pydflash.ArgumentError, r"prompt\[0\] is -1"),
        ([2**70], pydflash.ArgumentError, r"prompt\[0\] is 1180591620717411303424"),
        (["a"], pydflash.ArgumentError, "not a sequence of integer token ids"),
        (3, pydflash.ArgumentError, "not a sequence of integer token ids"),
        ([1.0], pydflash.ArgumentError, "not a sequence of integer token ids"),
        (b"text", pydflash.ArgumentError, "not a sequence of integer token ids"),
        ([1] * 512, pydflash.ContextFullError, "512 tokens, 1 too many for n_ctx=512 and one token of output"),
        ([1] * 700, pydflash.ContextFullError, "189 too many"),
    ],
)
def test_wrong_prompts(prompt: Any, error: type[Exception], sentence: str, tiny_session: Session) -> None:
    tiny_session.generate(PROMPT, max_tokens=2)
    before = tiny_session.n_tokens
    with pytest.raises(error, match=sentence):
        tiny_session.generate(prompt)
    assert tiny_session.n_tokens == before  # refused before any work


def test_a_full_context_says_by_how_much(tiny_session: Session) -> None:
    with pytest.raises(pydflash.ContextFullError) as caught:
        tiny_session.generate([1] * 600)
    assert (caught.value.need, caught.value.free) == (601, 512)
    with pytest.raises(pydflash.ContextFullError, match="1 more than n_ctx=512"):
        tiny_session.logits([1] * 513)


def test_wrong_files(tiny_target: Path, tiny_draft: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere.gguf"
    with pytest.raises(pydflash.ModelFileError, match="does not exist") as caught:
        Session(nowhere)
    assert caught.value.path == str(nowhere)
    with pytest.raises(pydflash.ModelFileError, match="does not exist"):
        Session(tiny_target, nowhere)
    with pytest.raises(pydflash.ModelFileError, match="is a folder"):
        Session(tmp_path)
    with pytest.raises(pydflash.ModelFileError, match="not a drafter's folder"):
        Session(tiny_target, tmp_path)
    with pytest.raises(pydflash.ArgumentError, match="NUL"):
        Session("a\0b")
    with pytest.raises(pydflash.UnsupportedModelError, match="dflash"):
        Session(tiny_draft)
    with pytest.raises(pydflash.UnsupportedModelError, match="qwen35"):
        Session(tiny_target, tiny_target)
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(pydflash.ModelFormatError, match=r"text\.gguf"):
        Session(tmp_path / "text.gguf")
    wide = TinyDraft(n_embd=128).write(tmp_path / "wide.gguf")
    with pytest.raises(pydflash.DraftMismatchError, match="128"):
        Session(tiny_target, wide)


def test_a_budget_without_a_drafter(tiny_target: Path) -> None:
    with Session(tiny_target, n_threads=1) as session, pytest.raises(pydflash.ArgumentError, match="has no drafter"):
        session.generate(PROMPT, budget=4)
    with Session(tiny_target, n_threads=1) as session, pytest.raises(pydflash.StateError, match="has no drafter"):
        session.draft_logits([1])


# ---- a model without a tokenizer ---------------------------------------------------------------------------------


def test_ids_alone(tmp_path: Path) -> None:
    with Session(TinyTarget().write(tmp_path / "bare.gguf"), n_threads=1) as session:
        result = session.generate([3, 1, 4, 1, 5], max_tokens=10)
        assert len(result.ids) == 10
        assert result.text == ""
        calls: list[Callable[[], object]] = [
            lambda: session.generate("text"),
            lambda: session.generate([1], stop="text"),
            lambda: session.tokenize("text"),
            lambda: session.detokenize([1]),
        ]
        for call in calls:
            with pytest.raises(pydflash.UnsupportedModelError, match="has no tokenizer; give and take token ids"):
                call()


# ---- looking inside ----------------------------------------------------------------------------------------------


def test_looking_inside(tiny_session: Session) -> None:
    ids = tiny_session.tokenize(PROMPT)
    logits = tiny_session.logits(ids)
    hidden = tiny_session.hidden(ids, [0, 3])
    drafted = tiny_session.draft_logits(ids)
    assert (logits.shape, logits.dtype) == ((len(ids), 288), np.float32)
    assert (hidden.shape, hidden.dtype) == ((len(ids), 2, 64), np.float32)
    assert (drafted.shape, drafted.dtype) == ((7, 288), np.float32)
    assert np.isfinite(logits).all()
    assert np.array_equal(hidden[:, 0], TinyTarget().tensors()["token_embd.weight"][ids])  # layer 0 sees the embedding
    assert int(logits[-1].argmax()) == tiny_session.generate(ids, max_tokens=1, ignore_eos=True).ids[0]
    # A causal model: what comes after does not change what came before.
    np.testing.assert_allclose(tiny_session.logits(ids[:5]), logits[:5], atol=1e-4)
    for bad in ([], [288], ["a"]):
        with pytest.raises(pydflash.ArgumentError):
            tiny_session.logits(bad)
    with pytest.raises(pydflash.ArgumentError, match="layers is 5"):
        tiny_session.hidden(ids, [5])
    tiny_session.logits(ids)
    assert tiny_session.n_tokens == 0


# ---- interrupted, abandoned, shared, closed ------------------------------------------------------------------------


def test_an_abandoned_stream_leaves_the_session_usable(tiny_session: Session) -> None:
    expected = tiny_session.generate(PROMPT, max_tokens=30, **SAMPLED).ids
    for n in range(4):
        stream = tiny_session.stream(PROMPT, max_tokens=30, **SAMPLED)
        for _ in range(n):
            next(stream)
        del stream
        gc.collect()
        assert tiny_session.generate(PROMPT, max_tokens=30, **SAMPLED).ids == expected


def test_a_stream_ends_when_its_timeline_is_taken(tiny_session: Session) -> None:
    takers: list[Callable[[], object]] = [
        lambda: tiny_session.generate(PROMPT, max_tokens=2),
        lambda: next(iter(tiny_session.stream(PROMPT, max_tokens=9))),
        lambda: tiny_session.logits([1]),
        tiny_session.reset,
    ]
    for take in takers:
        stream = iter(tiny_session.stream(PROMPT, max_tokens=30, **SAMPLED))
        next(stream)
        take()
        with pytest.raises(pydflash.StateError, match="another call has changed"):
            next(stream)


def test_cancel_from_another_thread(tiny_session: Session) -> None:
    chunks = []
    for chunk in tiny_session.stream(PROMPT, max_tokens=400, **SAMPLED):
        chunks.append(chunk)
        if len(chunks) == 3:
            thread = threading.Thread(target=tiny_session.cancel)
            thread.start()
            thread.join()
    result = chunks[-1].result
    assert result is not None
    assert result.finish_reason == "cancelled"
    assert len(chunks) == 4
    assert result.ids == [token for chunk in chunks for token in chunk.ids]
    assert tiny_session.generate(PROMPT, max_tokens=5, **SAMPLED).finish_reason == "length"


def test_keyboard_interrupt_leaves_the_session_usable(tiny_session: Session) -> None:
    expected = tiny_session.generate(PROMPT, max_tokens=30, **SAMPLED).ids

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        interrupted = 0
        for delay in (0.001, 0.003, 0.01, 0.02, 0.03):
            signal.setitimer(signal.ITIMER_REAL, delay)
            try:
                tiny_session.generate(PROMPT, max_tokens=480, **SAMPLED)
            except KeyboardInterrupt:
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert tiny_session.generate(PROMPT, max_tokens=30, **SAMPLED).ids == expected
        assert interrupted > 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_an_interrupt_between_step_and_commit(tiny_session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    expected = tiny_session.generate(PROMPT, max_tokens=30, **SAMPLED).ids
    with monkeypatch.context() as patch:
        patch.setattr(TextStream, "push", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tiny_session.generate(PROMPT)
    # The step was verified, so its first token stands.
    assert tiny_session.n_tokens == len(tiny_session.tokenize(PROMPT)) + 1
    assert tiny_session.generate(PROMPT, max_tokens=30, **SAMPLED).ids == expected
    assert tiny_session.logits([1, 2]).shape == (2, 288)


def test_threads_wait_for_one_another(tiny_session: Session) -> None:
    expected = {seed: tiny_session.generate(PROMPT, max_tokens=20, temperature=1.0, seed=seed).ids for seed in range(6)}
    got: dict[int, list[int]] = {}

    def run(seed: int) -> None:
        got[seed] = tiny_session.generate(PROMPT, max_tokens=20, temperature=1.0, seed=seed).ids

    threads = [threading.Thread(target=run, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected


def test_the_core_releases_the_gil(tiny_target: Path) -> None:
    """While one thread is inside one long call, another runs Python."""
    with Session(tiny_target, n_threads=1) as session:
        ids = [1] * 512
        busy, ticks = True, 0

        def tick() -> None:
            nonlocal ticks
            while busy:
                time.sleep(0.0005)
                ticks += 1

        thread = threading.Thread(target=tick)
        thread.start()
        for _ in range(5):
            session.logits(ids)
        busy = False
        thread.join()
    assert ticks > 12  # without the GIL released: about one between two calls


def test_closed_sessions(tiny_target: Path, tiny_draft: Path) -> None:
    session = Session(tiny_target, tiny_draft, n_threads=1)
    stream = iter(session.stream(PROMPT, max_tokens=30))
    next(stream)
    session.close()
    session.close()
    calls: list[Callable[[], object]] = [
        lambda: session.generate(PROMPT),
        lambda: next(stream),
        lambda: session.logits([1]),
        session.reset,
        lambda: session.n_tokens,
    ]
    for call in calls:
        with pytest.raises(pydflash.StateError, match="the session is closed"):
            call()
    assert session.tokenize("a") == [64]  # needs no core


def test_forgotten_sessions_are_freed(tiny_target: Path) -> None:
    session = Session(tiny_target)
    finalizer = session._finalizer
    del session
    gc.collect()
    assert not finalizer.alive


# ---- figures -----------------------------------------------------------------------------------------------------


def test_version() -> None:
    pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert f'\nversion = "{pydflash.__version__}"\n' in pyproject


def step(n_tokens: int, n_nodes: int, max_depth: int) -> SimpleNamespace:
    return SimpleNamespace(
        n_tokens=n_tokens,
        n_nodes=n_nodes,
        max_depth=max_depth,
        expected=1.5,
        draft_ms=1.0,
        build_ms=2.0,
        verify_ms=3.0,
        accept_ms=4.0,
    )


def test_tally() -> None:
    tally = Tally(n_prompt=11)
    tally.prefilled(0.5)
    tally.step(step(3, 9, 4), [1, 2, 3], ended=False, commit_ms=0.5, seconds=0.2)  # accepted depths 1 and 2 of 4
    tally.step(step(1, 9, 2), [4], ended=False, commit_ms=0.5, seconds=0.2)  # none of 2
    tally.step(step(2, 9, 4), [5, 6], ended=True, commit_ms=0.5, seconds=0.1)  # cut short after depth 1
    tally.text("ab")
    tally.text("c")
    result = tally.result("stop", seed=7)
    stats = result.stats
    assert (result.ids, result.text, result.finish_reason, result.seed) == ([1, 2, 3, 4, 5, 6], "abc", "stop", 7)
    assert stats.accepted_by_depth == [2 / 3, 1 / 2, 0.0, 0.0]
    assert stats.offered_by_depth == [3, 2, 1, 1]
    assert (stats.n_drafted, stats.tree_used) == (24, 3 / 24)
    assert (stats.mean_accepted, stats.mean_expected) == (2.0, 1.5)
    assert stats.ms == {"draft": 3.0, "build": 6.0, "verify": 9.0, "accept": 12.0, "commit": 1.5}
    assert (stats.prefill_tps, stats.prefill_ms, stats.decode_tps) == (20.0, 500.0, 12.0)
    assert stats.as_dict()["n_prompt"] == 11
