"""Whatever a session has been through, it says next what a fresh session says that is given the same tokens.

Random sequences of everything that moves a timeline, on a random pair with F32 weights and an f32 KV cache. The fresh
sessions decode plainly: no drafter, no copying, nothing kept from before.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from pydflash import Checkpoint, Session
from tests.tiny_models import TinyDraft, TinyTarget, byte_tokenizer, write_gguf

N_CTX, N_BATCH, N_VOCAB = 448, 64, 288
MAX_SESSIONS = 3
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

token = st.integers(0, N_VOCAB - 1)
# Repetition, so that there is something to copy from.
some_ids = st.one_of(
    st.lists(token, min_size=1, max_size=12),
    st.builds(lambda ids, n: ids * n, st.lists(token, min_size=1, max_size=8), st.integers(2, 12)),
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two layers, one of each kind, and a drafter of one. Eight tokens are likelier than all others, so that a tree of
    16 is often partly right though the drafter is random too."""
    target = TinyTarget(n_layer=2, recurrent=(True, False), n_ff=32, n_ctx=N_CTX)
    folder = tmp_path_factory.mktemp("pair")
    keys = target.gguf_keys() | byte_tokenizer(N_VOCAB) | {"tokenizer.chat_template": TEMPLATE}
    tensors = target.tensors()
    tensors["output.weight"][72:] /= 20
    tensors["output.weight"][:64] /= 20
    return (
        write_gguf(folder / "target.gguf", "qwen35", keys, tensors),
        TinyDraft.of(target, n_layer=1, target_ids=(0,), block_size=4).write(folder / "draft.gguf"),
    )


class Timelines(RuleBasedStateMachine):
    """A few sessions, the tokens each should hold, and the checkpoints that were taken of any."""

    target: ClassVar[Path]
    draft: ClassVar[Path]
    seen: ClassVar[dict[str, int]]

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.sessions: list[Session] = []
        self.held: list[list[int]] = []
        self.checkpoints: list[tuple[Checkpoint, list[int], list[dict[str, Any]]]] = []

    def teardown(self) -> None:
        for session in self.sessions:
            session.close()
        self.folder.cleanup()

    # ---- what is checked

    def expected(self, ids: list[int], n: int) -> list[int]:
        """What a fresh session says behind these tokens."""
        with Session(self.target, n_ctx=N_CTX, kv_type="f32", n_threads=1, n_batch=N_BATCH) as fresh:
            return fresh.generate(ids, max_tokens=n, ignore_eos=True).ids

    def check(self, at: int) -> None:
        session, held = self.sessions[at], self.held[at]
        assert session.tokens == held
        assert session.n_tokens == len(held)

    def say(self, at: int, prompt: list[int] | None, n: int) -> None:
        ids = self.held[at] if prompt is None else prompt
        common = len([0 for a, b in zip(ids, self.held[at], strict=False) if a == b])
        result = self.sessions[at].generate(prompt, max_tokens=n, ignore_eos=True)
        assert result.ids == self.expected(ids, n)
        assert result.cached_tokens <= common
        self.seen["tokens"] += len(result.ids)
        self.seen["steps"] += result.stats.n_steps
        self.seen["cached"] += result.cached_tokens
        self.held[at] = [*ids, *result.ids]
        self.check(at)

    def pick(self, which: int) -> int:
        return which % len(self.sessions)

    def room(self, at: int) -> int:
        return N_CTX - len(self.held[at])

    # ---- what happens

    @initialize()
    def open(self) -> None:
        self.sessions.append(
            Session(
                self.target, self.draft, n_ctx=N_CTX, kv_type="f32", n_threads=1, n_batch=N_BATCH, n_ring=256,
                budget=16, checkpoint_every=64,
            )
        )  # fmt: skip
        self.held.append([])

    @rule(which=st.integers(0, 5), ids=some_ids)
    def append(self, which: int, ids: list[int]) -> None:
        at = self.pick(which)
        ids = ids[: self.room(at)]
        self.sessions[at].append(ids)
        self.held[at] = self.held[at] + ids
        self.check(at)

    @rule(which=st.integers(0, 5), n=st.integers(1, 25))
    def go_on(self, which: int, n: int) -> None:
        at = self.pick(which)
        if self.held[at] and self.room(at) > 0:
            self.say(at, None, min(n, self.room(at)))

    @rule(which=st.integers(0, 5), cut=st.floats(0, 1), ids=some_ids, n=st.integers(1, 6))
    def generate(self, which: int, cut: float, ids: list[int], n: int) -> None:
        """A prompt that begins as the timeline does."""
        at = self.pick(which)
        prompt = (self.held[at][: int(cut * len(self.held[at]))] + ids)[: N_CTX - n]
        self.say(at, prompt, n)

    @rule(which=st.integers(0, 5), question=st.text("abe \n<>", max_size=12), n=st.integers(1, 6))
    def ask(self, which: int, question: str, n: int) -> None:
        at = self.pick(which)
        session = self.sessions[at]
        if self.room(at) < 150:
            return
        before = session.messages
        result = session.ask(question, max_tokens=n, ignore_eos=True)
        tokens = session.tokens
        prompt = tokens[: len(tokens) - len(result.ids)]
        assert result.ids == tokens[len(prompt) :] == self.expected(prompt, n)
        assert session.messages[:-2] == before
        assert [m["role"] for m in session.messages[-2:]] == ["user", "assistant"]
        assert session.detokenize(prompt).endswith(f"user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        self.held[at] = tokens

    @rule(which=st.integers(0, 5))
    def checkpoint(self, which: int) -> None:
        at = self.pick(which)
        checkpoint = self.sessions[at].checkpoint()
        assert checkpoint.n_tokens == len(self.held[at])
        self.checkpoints.append((checkpoint, self.held[at], self.sessions[at].messages))
        self.check(at)

    @precondition(lambda self: self.checkpoints)
    @rule(which=st.integers(0, 5), back=st.integers(0, 9))
    def rewind_to_a_checkpoint(self, which: int, back: int) -> None:
        """A checkpoint of any of the sessions, whatever has happened since."""
        at = self.pick(which)
        checkpoint, self.held[at], messages = self.checkpoints[back % len(self.checkpoints)]
        self.sessions[at].rewind(checkpoint)
        assert self.sessions[at].messages == messages
        self.check(at)

    @rule(which=st.integers(0, 5), cut=st.floats(0, 1))
    def rewind(self, which: int, cut: float) -> None:
        at = self.pick(which)
        n = int(cut * len(self.held[at]))
        self.sessions[at].rewind(n)
        self.held[at] = self.held[at][:n]
        self.check(at)

    @precondition(lambda self: len(self.sessions) < MAX_SESSIONS)
    @rule(which=st.integers(0, 5))
    def fork(self, which: int) -> None:
        at = self.pick(which)
        self.sessions.append(self.sessions[at].fork())
        self.held.append(self.held[at])
        self.check(at)
        self.check(-1)

    @rule(which=st.integers(0, 5))
    def save_and_load(self, which: int) -> None:
        at = self.pick(which)
        if not self.held[at]:
            return
        path = Path(self.folder.name) / "session"
        messages = self.sessions[at].messages
        self.sessions[at].save(path)
        self.check(at)
        self.sessions[at].close()
        self.sessions[at] = Session.load(path, n_threads=1)
        assert self.sessions[at].messages == messages
        self.check(at)


def test_whatever_came_before(pair: tuple[Path, Path]) -> None:
    class Machine(Timelines):
        target, draft = pair
        seen: ClassVar[dict[str, int]] = {"tokens": 0, "steps": 0, "cached": 0}

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=200, stateful_step_count=16, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    # So that this has seen trees that were partly accepted, and prompts that were partly held.
    assert Machine.seen["tokens"] > 1.1 * Machine.seen["steps"], Machine.seen
    assert Machine.seen["cached"] > 1000, Machine.seen
