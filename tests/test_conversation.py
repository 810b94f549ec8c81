"""A session that is kept: what it holds is not evaluated again, and what it says is what a fresh session would say.

Sessions run on F32 weights and an f32 cache where tokens are compared, so that nothing depends on how a prompt was cut.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydflash
from pydflash import Session
from pydflash._timeline import Timeline
from pydflash.constraint import Constraint
from tests.chat_templates import user
from tests.tiny_models import TinyTarget, byte_tokenizer, write_gguf

# The byte tokenizer has no ChatML tokens of its own; a template of plain text does as well.
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}!{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
GREEDY: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}
# An answer whose text, read again, is the same tokens.
PRINTABLE = GREEDY | {"logit_bias": {i: float("-inf") for i in range(288) if not 15 <= i < 25}}
WORDS = "the quick brown fox jumps over the lazy dog and reads the whole long document again "


@pytest.fixture(scope="module")
def chat_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random target with a chat template; "!" is token 0 and ends a turn."""
    target = TinyTarget()
    keys = target.gguf_keys() | byte_tokenizer(target.n_vocab)
    keys |= {"tokenizer.chat_template": TEMPLATE, "tokenizer.ggml.eos_token_id": np.uint32(0)}
    return write_gguf(tmp_path_factory.mktemp("chat") / "target.gguf", "qwen35", keys, target.tensors())


def opened(chat_target: Path, tiny_draft: Path, **options: Any) -> Session:
    return Session(chat_target, tiny_draft, kv_type="f32", n_threads=1, n_batch=64, checkpoint_every=128, **options)


@pytest.fixture
def session(chat_target: Path, tiny_draft: Path) -> Iterator[Session]:
    with opened(chat_target, tiny_draft) as session:
        yield session


fresh = session  # another one, to compare with


# ---- what is held is not evaluated again ---------------------------------------------------------------------------


def test_a_prompt_said_again(session: Session) -> None:
    first = session.generate(WORDS, **GREEDY)
    again = session.generate(WORDS, **GREEDY)
    n = len(session.tokenize(WORDS))
    assert (first.cached_tokens, again.cached_tokens) == (0, n - 1)
    assert again.ids == first.ids
    assert again.stats.n_cached == n - 1


def test_a_prompt_that_goes_on(session: Session, fresh: Session) -> None:
    first = session.generate(WORDS, **GREEDY)
    longer = session.tokens + session.tokenize(" and then")
    result = session.generate(longer, **GREEDY)
    assert result.cached_tokens == len(session.tokenize(WORDS)) + len(first.ids) - 1  # the last was pending
    assert result.ids == fresh.generate(longer, **GREEDY).ids


@pytest.mark.parametrize("same", [0, 1, 63, 64, 127, 128, 129, 200, 256, 300])
def test_a_prompt_that_parts(same: int, session: Session, fresh: Session) -> None:
    """Back to the last multiple of checkpoint_every, here 128, and no further than to where the two are the same."""
    ids = session.tokenize(WORDS * 6)[:400]
    other = ids[:same] + session.tokenize("something else altogether")
    session.generate(ids, **GREEDY)
    result = session.generate(other, **GREEDY)
    assert result.cached_tokens == same // 128 * 128
    assert result.ids == fresh.generate(other, **GREEDY).ids


def test_sampled_with_penalties(session: Session, fresh: Session) -> None:
    settings = {"temperature": 1.0, "seed": 3, "repeat_penalty": 1.2, "presence_penalty": 0.5, "logit_bias": {70: 2.0}}
    session.generate(WORDS * 3, **GREEDY)
    prompt = WORDS * 2 + "and on"
    assert session.generate(prompt, **GREEDY, **settings).ids == fresh.generate(prompt, **GREEDY, **settings).ids


def test_messages_end_where_the_state_is_kept(session: Session, fresh: Session) -> None:
    document = [user(WORDS * 2)]
    session.append(document)
    held = session.n_tokens
    for question in ("What does it jump over?", "Who reads?"):
        result = session.chat([*document, user(question)], **GREEDY)
        assert held - 1 <= result.cached_tokens <= held
        assert result.ids == fresh.chat([*document, user(question)], **GREEDY).ids


# ---- a conversation ------------------------------------------------------------------------------------------------


def test_asking(session: Session, fresh: Session) -> None:
    first = session.ask("Who jumps?", **GREEDY)
    second = session.ask("Over what?", **GREEDY)
    messages = [user("Who jumps?"), {"role": "assistant", "content": first.content}, user("Over what?")]
    assert session.messages == [*messages, {"role": "assistant", "content": second.content}]
    assert second.cached_tokens > 0
    assert fresh.chat(messages, **GREEDY).ids == second.ids
    assert [fresh.messages[-1]] == session.messages[-1:]


def test_asking_behind_tokens(session: Session) -> None:
    session.append(WORDS)
    raw = session.tokens
    session.ask("Who?", **GREEDY)
    assert session.tokens[: len(raw)] == raw
    assert session.detokenize(session.tokens).startswith(f"{WORDS}[user]Who?![assistant]")
    assert len(session.messages) == 2


def test_streams_say_what_whole_answers_say(session: Session) -> None:
    whole = session.chat([user("Who jumps?")], **GREEDY)
    chunks = list(session.stream_chat([user("Who jumps?")], **GREEDY))
    last = chunks[-1].result
    assert last is not None
    assert (last.ids, last.content, last.reasoning) == (whole.ids, whole.content, whole.reasoning)
    assert "".join(chunk.content for chunk in chunks) == whole.content
    assert "".join(chunk.text for chunk in chunks) == whole.text


def test_a_document(session: Session, fresh: Session, tmp_path: Path) -> None:
    path = tmp_path / "fox.txt"
    path.write_text(WORDS * 2)
    [document] = session.append_document(path)
    answer = session.ask("Who?", **GREEDY)
    assert session.messages[0] == user(document.as_prompt())
    assert answer.cached_tokens >= len(session.tokenize(WORDS * 2))
    assert fresh.chat([user(document.as_prompt()), user("Who?")], **GREEDY).ids == answer.ids
    path.write_text(WORDS * 200)
    before = session.tokens
    with pytest.raises(pydflash.ContextFullError, match=r"fox.txt does not fit: .* \d+ tokens, \d+ too many"):
        session.append_document(path)
    assert session.tokens == before


def test_logprobs(session: Session) -> None:
    result = session.generate("ab", max_tokens=6, ignore_eos=True, logprobs=3)
    assert result.logprobs is not None
    logits = session.logits([*session.tokenize("ab"), *result.ids])[1:-1].astype(np.float64)
    expected = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    expected -= logits.max(-1, keepdims=True)
    for token, row in zip(result.logprobs, expected, strict=True):
        assert token.logprob == pytest.approx(row[token.id], abs=1e-4)
        assert [i for i, _ in token.top] == list(np.argsort(-row, kind="stable")[:3])
        assert [p for _, p in token.top] == pytest.approx([row[i] for i, _ in token.top], abs=1e-4)


# ---- going back, forks ---------------------------------------------------------------------------------------------


def test_going_back(session: Session, fresh: Session) -> None:
    session.append(WORDS * 3)
    here = session.checkpoint()
    first = session.generate(None, **GREEDY)
    session.rewind(here)
    assert session.n_tokens == here.n_tokens
    assert session.generate(None, **GREEDY).ids == first.ids
    for n in (here.n_tokens - 1, 200, 100, 1):
        ids = session.tokens[:n]
        session.rewind(n)
        assert session.tokens == ids
        assert session.generate(None, **GREEDY).ids == fresh.generate(ids, **GREEDY).ids
    session.rewind(0)
    assert session.tokens == []
    session.rewind(here)  # its tokens are gone, but not forgotten
    assert session.generate(None, **GREEDY).ids == first.ids
    with pytest.raises(pydflash.ArgumentError, match="to is 9999"):
        session.rewind(9999)


def test_messages_go_back_too(session: Session) -> None:
    session.ask("Who?", **PRINTABLE)
    here, messages = session.checkpoint(), session.messages
    for _ in range(2):
        session.ask("Where?", **PRINTABLE)
        session.rewind(here)
        assert session.messages == messages
    session.ask("Where?", **PRINTABLE)
    session.rewind(here.n_tokens)
    assert session.messages == messages
    session.rewind(here.n_tokens - 3)  # in the middle of an answer
    assert session.messages == []
    held = session.tokens
    session.ask("When?", **GREEDY)
    assert session.tokens[: len(held)] == held


def test_a_fork_goes_its_own_way(session: Session, fresh: Session) -> None:
    session.ask("Who?", **GREEDY)
    twin = session.fork()
    assert twin.tokens == session.tokens
    assert twin.messages == session.messages
    mine, other = session.ask("Where?", **GREEDY), twin.ask("When?", **GREEDY)
    assert mine.ids == fresh.chat(session.messages[:-1], **GREEDY).ids
    assert other.ids == fresh.chat(twin.messages[:-1], **GREEDY).ids
    session.close()  # the models live on
    grandchild = twin.fork()
    twin.close()
    assert grandchild.ask("Why?", **GREEDY).ids == fresh.chat(grandchild.messages[:-1], **GREEDY).ids
    grandchild.close()


def test_checkpoints_keep_to_their_memory(chat_target: Path, tiny_draft: Path) -> None:
    with opened(chat_target, tiny_draft, checkpoint_memory="200KiB") as small:
        small.append(WORDS * 5)
        kept = small._held.snapshots
        assert 0 < len(kept) < 5
        assert sum(len(snapshot.state) for snapshot in kept) <= 200 * 1024
    with opened(chat_target, tiny_draft, checkpoint_memory=1) as none:
        ids = none.generate(WORDS, **GREEDY).ids
        assert none._held.snapshots == []
        assert none.generate(WORDS, **GREEDY).ids == ids


# ---- cut short, refused --------------------------------------------------------------------------------------------


def test_a_prompt_that_is_cut_short_goes_on_later(session: Session, fresh: Session) -> None:
    ids = session.tokenize(WORDS * 4)
    seen = []

    def stop_after_two(progress: pydflash.Progress) -> None:
        seen.append(progress)
        if len(seen) == 2:
            session.cancel()

    assert session.append(ids, progress=stop_after_two) == 129
    assert [(p.n_done, p.n_total) for p in seen] == [(65, len(ids)), (129, len(ids))]
    assert session.tokens == ids[:129]
    result = session.generate(ids, **GREEDY)
    assert result.cached_tokens == 128
    assert result.ids == fresh.generate(ids, **GREEDY).ids


def test_going_back_can_be_cancelled(chat_target: Path, tiny_draft: Path) -> None:
    with opened(chat_target, tiny_draft, checkpoint_memory=1) as session:  # no place is kept: all is read again
        ids = session.tokenize(WORDS * 5)
        done = threading.Event()

        def cancel_until_done() -> None:
            while not done.is_set():
                session.cancel()

        thread = threading.Thread(target=cancel_until_done)
        thread.start()
        try:
            for _ in range(50):  # until the other thread had its turn meanwhile
                session.rewind(0)
                while session.n_tokens < len(ids):
                    session.append(ids[session.n_tokens :])
                session.rewind(len(ids) - 1)
                assert session.tokens == ids[: session.n_tokens]
                if session.n_tokens < len(ids) - 1:
                    break
        finally:
            done.set()
            thread.join()
        assert session.n_tokens < len(ids) - 1
        session.rewind(0)
        assert session.n_tokens == 0


def test_a_run_that_is_cancelled_in_its_prompt(session: Session) -> None:
    result = session.generate(WORDS * 4, progress=lambda _: session.cancel(), **GREEDY)
    assert (result.finish_reason, result.ids) == ("cancelled", [])
    assert session.n_tokens == 65


def test_an_error_of_the_caller_leaves_the_session_usable(session: Session) -> None:
    def fail(_: pydflash.Progress) -> None:
        raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="own"):
        session.append(WORDS, progress=fail)
    assert session.n_tokens == 65
    assert session.generate(WORDS, **GREEDY).cached_tokens == 64


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "messages is empty"),
        ("hello", "messages must be a list of"),
        ([{"content": "x"}], r"messages\[0\] must be {'role'"),
        (["x"], r"messages\[0\] must be {'role'"),
    ],
)
def test_wrong_messages(messages: Any, sentence: str, session: Session) -> None:
    with pytest.raises(pydflash.ArgumentError, match=sentence):
        session.chat(messages)


def test_a_model_without_a_template(tiny_session: Session, tmp_path: Path) -> None:
    with pytest.raises(pydflash.UnsupportedModelError, match="no chat template"):
        tiny_session.ask("Who?")
    (tmp_path / "a.txt").write_text("text")
    tiny_session.append_document(tmp_path / "a.txt")
    assert tiny_session.detokenize(tiny_session.tokens) == '<document name="a.txt">\ntext\n</document>\n'


def test_wrong_settings(session: Session) -> None:
    with pytest.raises(pydflash.UnknownOptionError, match=r"Session.ask has no option 'budgt', did you mean 'budget'"):
        session.ask("x", budgt=3)
    with pytest.raises(pydflash.ArgumentError, match=r"sampling is 3; give a pydflash.Sampling"):
        session.ask("x", 3)  # type: ignore[arg-type]
    sampling = pydflash.Sampling(temperature=1.0, seed=4)
    assert session.ask("x", sampling, max_tokens=3, ignore_eos=True).seed == 4


# ---- files ---------------------------------------------------------------------------------------------------------


def test_saved_and_loaded(session: Session, chat_target: Path, tiny_draft: Path, tmp_path: Path) -> None:
    session.append([user(WORDS * 3)])
    session.ask("Who?", **GREEDY)
    n_bytes = session.save(tmp_path / "fox.session")
    assert (tmp_path / "fox.session").stat().st_size == n_bytes
    with Session.load(tmp_path / "fox.session", n_threads=1) as loaded:
        assert loaded.tokens == session.tokens
        assert loaded.messages == session.messages
        assert loaded.n_ctx == session.n_ctx
        mine, theirs = session.ask("Where?", **GREEDY), loaded.ask("Where?", **GREEDY)
        assert theirs.ids == mine.ids
        assert theirs.cached_tokens == mine.cached_tokens
        loaded.rewind(100)  # with the snapshots of before
        session.rewind(100)
        assert loaded.generate(None, **GREEDY).ids == session.generate(None, **GREEDY).ids
    at_the_question = session.tokens
    session.reset()
    session.ask("Something else?", **GREEDY)
    session.restore(tmp_path / "fox.session")
    assert session.ask("Where?", **GREEDY).ids == mine.ids
    session.rewind(100)
    assert session.tokens == at_the_question[:100]
    with pytest.raises(pydflash.SessionFileError, match="was saved with a draft, but this"):
        Session.load(tmp_path / "fox.session", chat_target)
    with pytest.raises(pydflash.SessionFileError, match="kv_type"):
        Session.load(tmp_path / "fox.session", chat_target, tiny_draft, kv_type="f16")
    with pytest.raises(pydflash.ContextFullError, match="too many for n_ctx=100"):
        Session.load(tmp_path / "fox.session", n_ctx=100)
    with pytest.raises(pydflash.SessionFileError):
        Session.load(chat_target)
    with pytest.raises(pydflash.SessionFileError):
        session.restore(chat_target)
    assert session.tokens == at_the_question[:100]


def test_an_empty_session_is_saved_too(session: Session, tmp_path: Path) -> None:
    session.save(tmp_path / "empty.session")
    with Session.load(tmp_path / "empty.session", n_threads=1) as loaded:
        assert loaded.tokens == []
        assert loaded.ask("Who?", **GREEDY).ids == session.ask("Who?", **GREEDY).ids


def test_a_document_is_read_once(chat_target: Path, tiny_draft: Path, tmp_path: Path) -> None:
    document = [user(WORDS * 4)]
    with opened(chat_target, tiny_draft, cache_dir=tmp_path) as first:
        expected = first.chat([*document, user("Who?")], **GREEDY)
        other = first.chat([*document, user("Where?")], **GREEDY)
        assert expected.cached_tokens == 0
    assert len(list(tmp_path.glob("*.session"))) == 1
    with opened(chat_target, tiny_draft, cache_dir=tmp_path) as second:
        again = second.chat([*document, user("Where?")], **GREEDY)
        assert again.ids == other.ids
        assert again.cached_tokens >= len(second.tokenize(WORDS * 4))
        assert second.ask("And why?", **GREEDY).cached_tokens > again.cached_tokens
    with opened(chat_target, tiny_draft, cache_dir=tmp_path) as third:
        third.append(document)
        assert third.chat([*document, user("Who?")], **GREEDY).ids == expected.ids
    for entry in tmp_path.glob("*.session"):  # a broken one is a miss
        entry.write_bytes(entry.read_bytes()[:-100])
    with opened(chat_target, tiny_draft, cache_dir=tmp_path) as fourth:
        result = fourth.chat([*document, user("Who?")], **GREEDY)
        assert (result.ids, result.cached_tokens) == (expected.ids, 0)
    with pytest.raises(pydflash.ArgumentError, match="cache_size is 'much'"):
        opened(chat_target, tiny_draft, cache_dir=tmp_path, cache_size="much")


# ---- answers held to a format --------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 16])
def test_an_answer_held_to_a_choice(budget: int, session: Session) -> None:
    colours = {"choice": ["red", "green", "dark blue"]}
    result = session.chat([user("A colour?")], response_format=colours, max_tokens=40, budget=budget)
    assert result.content in colours["choice"]
    assert result.finish_reason == "stop"
    free = session.chat([user("A colour?")], max_tokens=40, budget=budget)  # the next one is free again
    assert free.content not in colours["choice"]


def test_what_is_no_format_is_refused_before_any_work(session: Session) -> None:
    session.append(WORDS)
    before = session.tokens
    with pytest.raises(pydflash.ArgumentError, match="response_format"):
        session.generate(None, response_format={"regexp": "a+"})
    assert session.tokens == before


@pytest.mark.parametrize("budget", [0, 16])
@pytest.mark.parametrize("method", ["_mask", "_allowed", "_forced"])
def test_a_format_that_fails_on_the_way_loses_nothing(
    budget: int, method: str, session: Session, fresh: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stood when it failed still stands, and the session goes on from there."""
    honest = getattr(Constraint, method)
    calls = []

    def fails(self: Constraint, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a grammar that fails")
        return honest(self, *arguments)

    monkeypatch.setattr(Constraint, method, fails)
    session.append(WORDS)
    before = session.tokens
    try:
        session.generate(None, response_format={"regex": "[a-z ]{200}"}, max_tokens=60, budget=budget)
    except RuntimeError:
        assert len(calls) == 3
    else:
        assert budget == 0  # no tree to ask about
        assert method != "_mask"
    assert session.tokens[: len(before)] == before
    monkeypatch.undo()
    held = session.tokens
    assert session.generate(None, **GREEDY).ids == fresh.generate(held, **GREEDY).ids


@pytest.mark.parametrize("budget", [0, 16])
def test_a_bias_that_forbids_everything_loses_nothing(budget: int, session: Session, fresh: Session) -> None:
    session.append(WORDS)
    nothing = {i: float("-inf") for i in range(288)}
    with pytest.raises(pydflash.ArgumentError, match="logit_bias forbids every token"):
        session.generate(None, logit_bias=nothing, budget=budget)
    assert session.tokens == session.tokenize(WORDS)
    assert session.generate(None, **GREEDY).ids == fresh.generate(WORDS, **GREEDY).ids


# ---- calls that meet -----------------------------------------------------------------------------------------------


def test_a_stream_that_was_overtaken_says_so(session: Session) -> None:
    """What a stream goes on from is what the session held when it was asked for."""
    for make in (lambda: session.stream_ask("Who?", **GREEDY), lambda: session.stream(None, **GREEDY)):
        session.append(WORDS)
        stream = make()
        session.ask("Where?", **GREEDY)
        messages, tokens = session.messages, session.tokens
        with pytest.raises(pydflash.StateError, match="another call has changed"):
            next(iter(stream))
        assert (session.messages, session.tokens) == (messages, tokens)


def test_asking_from_many_threads_loses_no_question(session: Session) -> None:
    threads = [threading.Thread(target=session.ask, args=(f"Question {i}?",), kwargs=GREEDY) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asked = [message["content"] for message in session.messages if message["role"] == "user"]
    assert sorted(asked) == [f"Question {i}?" for i in range(4)]


def test_what_was_left_in_the_middle_stands(session: Session) -> None:
    stream = iter(session.stream(WORDS, **GREEDY))
    next(stream)
    held = session.tokens
    session.ask("Who?", **GREEDY)
    assert session.tokens[: len(held)] == held
    session.reset()
    chat = iter(session.stream_ask("Who?", **PRINTABLE, budget=0))
    said = next(chat).content
    assert session.messages == [user("Who?"), {"role": "assistant", "content": said}]
    messages = session.messages
    assert session.append("") == session.n_tokens
    assert session.messages == messages


def test_assigned_messages_are_what_is_followed(session: Session, fresh: Session) -> None:
    other = [user("Once?"), {"role": "assistant", "content": "Twice."}]
    for leave_early in (False, True):
        stream = session.stream_ask("Who?", **GREEDY)
        next(iter(stream)) if leave_early else list(stream)
        session.messages = other
        answer = session.ask("Where?", **GREEDY)
        assert session.messages[:3] == [*other, user("Where?")]
        assert answer.ids == fresh.chat([*other, user("Where?")], **GREEDY).ids


def test_nothing_said_is_no_answer(session: Session) -> None:
    session.ask("Who jumps over what? " * 8, progress=lambda _: session.cancel(), **GREEDY)
    assert [message["role"] for message in session.messages] == ["user"]


def test_other_messages_are_another_timeline(session: Session) -> None:
    session.ask("Who?", **PRINTABLE)
    n = session.n_tokens
    session.chat([user("Something else entirely, and long enough")], **PRINTABLE)
    session.rewind(n)
    assert session.messages == []  # no call ended with these tokens


def test_a_call_from_inside_a_call_is_refused(session: Session) -> None:
    with pytest.raises(pydflash.StateError, match="from inside another one of the same session"):
        session.append(WORDS, progress=lambda _: print(session.n_tokens))
    assert session.n_tokens == 65
    assert session.generate(WORDS, **GREEDY).ids


def test_penalties_of_output_begin_with_each_run(session: Session, fresh: Session) -> None:
    settings = {"presence_penalty": 2.0, "frequency_penalty": 1.0}
    session.generate(WORDS, **GREEDY)
    held = session.tokens
    for prompt in (None, held):
        said = session.generate(prompt, **GREEDY, **settings).ids
        assert said == fresh.generate(held, **GREEDY, **settings).ids
        session.rewind(len(held))


def test_an_interrupted_restore_forgets_what_was_held(
    session: Session, fresh: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.append(WORDS * 3)
    session.save(tmp_path / "a.session")
    session.reset()
    session.append("something else " * 30)
    with monkeypatch.context() as patch:
        patch.setattr(Timeline, "replace_snapshots", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.restore(tmp_path / "a.session")
    held = session.tokens
    prompt = held[:200] + session.tokenize("and on")
    assert session.generate(prompt, **GREEDY).ids == fresh.generate(prompt, **GREEDY).ids
    session.save(tmp_path / "b.session")
    Session.load(tmp_path / "b.session").close()


def test_a_model_file_that_has_changed_is_not_vouched_for(
    chat_target: Path, tiny_draft: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "target.gguf"
    shutil.copy(chat_target, target)
    with opened(target, tiny_draft, cache_dir=tmp_path / "cache") as session:
        shutil.copy(chat_target, tmp_path / "other.gguf")
        (tmp_path / "other.gguf").replace(target)
        session.append(WORDS * 4)  # not kept, and why is in the log
        assert "no longer the file" in caplog.text
        with pytest.raises(pydflash.SessionFileError, match="no longer the file that this session was opened with"):
            session.save(tmp_path / "a.session")


def test_documents_hold_no_special_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<|im_end|> is how a turn ends")
    with Session(n_ctx=1024, n_threads=1) as session:
        session.tokenizer.chat_template = None  # type: ignore[union-attr]
        session.append_document(tmp_path / "a.txt")
        assert not session.tokenizer.stop_ids & set(session.tokens)  # type: ignore[union-attr]
