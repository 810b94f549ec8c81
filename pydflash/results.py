"""What a run gives back: chunks while it goes on, a result with its figures at the end."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pydflash.chat.answer import AnswerStream

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]
ToolCall = dict[str, Any]  # OpenAI's: {"index", "id", "type": "function", "function": {"name", "arguments"}}


@dataclass(frozen=True)
class Stats:
    """Figures of one run. Times are milliseconds, rates tokens a second."""

    n_prompt: int
    n_cached: int  # tokens of the prompt that the session held already
    n_generated: int
    n_steps: int  # target passes after prefill
    mean_accepted: float  # tokens committed per target pass; 0 without a pass
    mean_expected: float  # what the trees had promised; with budget="auto" corrected by experience
    accepted_by_depth: list[float]  # [d - 1]: of the steps that offered depth d, the share that accepted it
    offered_by_depth: list[int]  # [d - 1]: how many those steps are
    n_drafted: int  # nodes that were verified besides the roots
    tree_used: float | None  # accepted share of the drafted nodes; None when none was drafted
    ms: dict[str, float]  # draft, build, verify, accept, commit: sums over all steps
    prefill_ms: float
    prefill_tps: float
    decode_tps: float
    output_hash: str  # 16 hex digits: SHA-256 over the ids as little-endian int32

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON takes them."""
        return asdict(self)


@dataclass(frozen=True)
class Counters:
    """What a session has moved to and from where it computes, and what it has built there, since it was opened.

    On the CPU the same copies are made and counted as on a GPU.
    """

    n_set: int  # copies to the device
    bytes_set: int
    n_get: int  # copies from it
    bytes_get: int
    graphs_built: int  # one for each shape in use
    graph_runs: int
    buffers: int  # allocated after opening

    def __sub__(self, earlier: Counters) -> Counters:
        """What happened since `earlier`."""
        return Counters(*(a - b for a, b in zip(astuple(self), astuple(earlier), strict=True)))


@dataclass(frozen=True)
class Costs:
    """Milliseconds on this machine.

    pass_ms: of a target pass over so many nodes, with its commit. draft_ms: of drafting a block; None: no drafter.
    """

    pass_ms: dict[int, float]
    draft_ms: float | None


@dataclass(frozen=True)
class TokenLogprob:
    """What the model made of one token that was said, before any sampling setting.

    logprob: its log-probability. top: the likeliest tokens instead of it, likeliest first, as (id, log-probability).
    """

    id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Result:
    """One whole generation.

    ids: the tokens committed after the prompt, the one that ended the run included.
    text: their text, without control tokens, cut before a stop token or stop string.
    finish_reason: "stop" (a stop token or string), "length" (max_tokens, or the context is full), "tool_calls" (a
        chat's answer that ended and calls tools) or "cancelled".
    mean_accepted: tokens committed per target pass.
    seed: what the draws were made with; give it again to get the same text.
    cached_tokens: tokens of the prompt that the session held already, so that they were not evaluated.
    content, reasoning, tool_calls: of a chat, the text by its parts; else content is the text.
    logprobs: a token each, where they were asked for.
    """

    ids: list[int]
    text: str
    finish_reason: FinishReason
    mean_accepted: float
    stats: Stats
    seed: int
    cached_tokens: int
    content: str
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class Chunk:
    """What one step adds.

    text: whole characters only; what may be the beginning of a stop string is held back until it is not.
    ids: the tokens the step committed; all chunks' ids are the result's ids, all chunks' text is its text.
    accepted: how many they are.
    content, reasoning, tool_calls: of a chat, what the text adds to each, tool calls as OpenAI's deltas; else content
        is the text.
    result: on the last chunk, the whole; None before.
    """

    text: str
    ids: list[int]
    accepted: int
    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    result: Result | None = None


def output_hash(ids: Sequence[int]) -> str:
    """16 hex digits that tell one sequence of ids from another: SHA-256 over them as little-endian int32."""
    return hashlib.sha256(struct.pack(f"<{len(ids)}i", *ids)).hexdigest()[:16]


class Tally:
    """Adds up the steps of a run."""

    def __init__(self, n_prompt: int, n_cached: int = 0) -> None:
        self._n_prompt = n_prompt
        self._n_cached = n_cached
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None
        self._text: list[str] = []
        self._n_steps = 0
        self._offered: list[int] = []  # [d - 1]: steps that offered depth d
        self._reached: list[int] = []
        self._n_drafted = 0
        self._expected = 0.0
        self._n_used = 0
        self._ms = dict.fromkeys(("draft", "build", "verify", "accept", "commit"), 0.0)
        self._prefill_s = 0.0
        self._decode_s = 0.0

    def prefilled(self, seconds: float) -> None:
        """The prompt was evaluated, all but its last token, in this time."""
        self._prefill_s = seconds

    def text(self, piece: str) -> None:
        """Text that was given out."""
        self._text.append(piece)

    def step(
        self,
        step: Any,
        kept: list[int],
        logprobs: list[TokenLogprob] | None = None,
        *,
        ended: bool,
        commit_ms: float,
        seconds: float,
    ) -> None:
        """One step: pf_step_result, the tokens of it that were kept, whether the walk was cut short by a stop token or
        by max_tokens (what lay deeper was then never asked, and counts as not offered), and its time on the clock."""
        self._ids += kept
        if logprobs is not None:
            self._logprobs = (self._logprobs or []) + logprobs
        self._n_steps += 1
        reached = step.n_tokens - 1
        offered = reached if ended else max(reached, step.max_depth)
        if offered > len(self._offered):
            self._offered += [0] * (offered - len(self._offered))
            self._reached += [0] * (offered - len(self._reached))
        for depth in range(offered):
            self._offered[depth] += 1
            self._reached[depth] += depth < reached
        self._n_drafted += step.n_nodes - 1
        self._expected += step.expected
        self._n_used += reached
        ms = self._ms
        ms["draft"] += step.draft_ms
        ms["build"] += step.build_ms
        ms["verify"] += step.verify_ms
        ms["accept"] += step.accept_ms
        ms["commit"] += commit_ms
        self._decode_s += seconds

    def result(self, finish_reason: FinishReason, seed: int, answer: AnswerStream | None = None) -> Result:
        """The run as a whole; answer: the parts of its text, of a chat."""
        n_generated = len(self._ids)
        stats = Stats(
            n_prompt=self._n_prompt,
            n_cached=self._n_cached,
            n_generated=n_generated,
            n_steps=self._n_steps,
            mean_accepted=n_generated / self._n_steps if self._n_steps else 0.0,
            mean_expected=self._expected / self._n_steps if self._n_steps else 0.0,
            accepted_by_depth=[r / o for r, o in zip(self._reached, self._offered, strict=True)],
            offered_by_depth=list(self._offered),
            n_drafted=self._n_drafted,
            tree_used=self._n_used / self._n_drafted if self._n_drafted else None,
            ms=dict(self._ms),
            prefill_ms=self._prefill_s * 1e3,
            prefill_tps=(self._n_prompt - 1 - self._n_cached) / self._prefill_s if self._prefill_s else 0.0,
            decode_tps=n_generated / self._decode_s if self._decode_s else 0.0,
            output_hash=output_hash(self._ids),
        )
        text = "".join(self._text)
        result = Result(
            ids=list(self._ids),
            text=text,
            finish_reason=finish_reason,
            mean_accepted=stats.mean_accepted,
            stats=stats,
            seed=seed,
            cached_tokens=self._n_cached,
            content=text,
            logprobs=self._logprobs,
        )
        if answer is None:
            return result
        calls = answer.tool_calls
        return replace(
            result,
            finish_reason="tool_calls" if calls and finish_reason == "stop" else finish_reason,
            content=answer.content,
            reasoning=answer.reasoning,
            tool_calls=calls,
        )
