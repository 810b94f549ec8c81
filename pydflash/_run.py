"""One run: the prompt becomes the timeline, then step after step until something ends it.

Owns the order draft-verify-commit as Python sees it, what text is given out when, and what stands after an interrupt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydflash._lib import check, ffi, lib
from pydflash._text import TextStream
from pydflash._timeline import Progress, Timeline
from pydflash.results import Chunk, FinishReason, Tally, TokenLogprob

if TYPE_CHECKING:
    from pydflash.chat.answer import AnswerStream
    from pydflash.constraint import Constraint
    from pydflash.tokenizer import Tokenizer


@dataclass(frozen=True)
class Request:
    """A run, all of it checked."""

    ids: list[int]  # the whole timeline before the first step
    ends: list[int]  # where messages end in it
    max_tokens: int
    stops: list[str]
    params: Any  # pf_generate_params
    keep: Any  # the arrays params points into
    seed: int
    n_logprobs: int | None
    progress: Callable[[Progress], None] | None
    answer: AnswerStream | None  # of a chat: thinking and tool calls are told apart
    constraint: Constraint | None  # what the text is held to
    settle: Callable[[], None]  # makes the conversation what stands by now


def run(
    session: Any,
    timeline: Timeline,
    tokenizer: Tokenizer | None,
    request: Request,
    cancelled: Callable[[], bool],
    prefill: Callable[[], int],
) -> Generator[Chunk, None, None]:
    """Chunk after chunk, the result on the last. What has been said stands on the timeline, however the run ends.

    prefill makes the request's ids the timeline and gives the number of tokens that were there already.
    """
    check(lib.pf_session_configure(session, request.params))  # before prefill: the budget sizes what that keeps
    constraint = request.constraint
    check(lib.pf_session_constrain(session, ffi.NULL if constraint is None else constraint.attach()))
    text = TextStream(tokenizer, request.stops)
    started = time.perf_counter()
    n_cached = prefill()
    tally = Tally(len(request.ids), n_cached)
    tally.prefilled(time.perf_counter() - started)

    step = ffi.new("pf_step_result *", {"size": ffi.sizeof("pf_step_result")})
    commit_ms = ffi.new("double *")
    left = request.max_tokens
    finish: FinishReason | None = None
    while finish is None:
        kept: list[int] = []
        logprobs: list[TokenLogprob] | None = None if request.n_logprobs is None else []
        given = ""
        if cancelled():
            finish = "cancelled"
        elif left == 0:
            finish = "length"
        else:
            started = time.perf_counter()
            status = lib.pf_session_step(session, left, step)
            check(status) if constraint is None else constraint.check(status)
            tokens = ffi.unpack(step.tokens, step.n_tokens)
            # A stop token has no text.
            given, n_cut = text.push(tokens[:-1] if step.stopped else tokens)
            kept = tokens[:n_cut]
            if request.n_logprobs is not None:
                logprobs = step_logprobs(session, tokens, request.n_logprobs)[:n_cut]
            check(lib.pf_session_commit(session, len(kept), commit_ms))
            if constraint is not None:
                constraint.commit(kept)
            tally.step(
                step,
                kept,
                logprobs,
                ended=bool(step.stopped) or len(tokens) == left,
                commit_ms=commit_ms[0],
                seconds=time.perf_counter() - started,
            )
            left -= len(kept)
            if n_cut is not None or step.stopped:
                finish = "stop"
            elif left == 0:
                finish = "length"
        if finish is not None:
            given += text.finish()
            if finish != "cancelled":
                timeline.snapshot()
        tally.text(given)
        chunk = Chunk(given, kept, len(kept), content=given, logprobs=logprobs)
        if request.answer is not None:
            delta = request.answer.push(given)
            if finish is not None:
                delta += request.answer.finish(cut=finish != "stop")
            chunk = replace(chunk, content=delta.content, reasoning=delta.reasoning, tool_calls=delta.tool_calls)
        if finish is not None:
            chunk = replace(chunk, result=tally.result(finish, request.seed, request.answer))
        yield chunk


def step_logprobs(session: Any, tokens: list[int], n_top: int) -> list[TokenLogprob]:
    """What the model made of each token of the last step."""
    n = len(tokens)
    logp, top_ids, top_logp = ffi.new("float[]", n), ffi.new("int32_t[]", n * n_top), ffi.new("float[]", n * n_top)
    check(lib.pf_session_logprobs(session, logp, top_ids, top_logp))
    rows = [range(i * n_top, (i + 1) * n_top) for i in range(n)]
    return [
        TokenLogprob(token, float(logp[i]), [(int(top_ids[k]), float(top_logp[k])) for k in rows[i]])
        for i, token in enumerate(tokens)
    ]
