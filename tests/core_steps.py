"""Decoding through the C interface, for tests that set what `Session.generate` does not, or look into a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pydflash import Session, options
from pydflash._lib import check, ffi, lib
from pydflash.constraint import Constraint

DEFAULTS: dict[str, Any] = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "stop_ids": []}


class Said(NamedTuple):
    """What a run said. The log-probabilities are empty where the settings do not ask for them."""

    ids: list[int]
    n_steps: int
    logp: list[float]
    top_ids: list[list[int]]
    top_logp: list[list[float]]


def say(
    session: Session,
    prompt: Sequence[int],
    n: int,
    *,
    budget: int = 16,
    chain: bool = False,
    keep: Callable[[int], int] = lambda n_tokens: n_tokens,
    constraint: Constraint | None = None,
    **settings: Any,
) -> Said:
    """n tokens after a prompt, or as many as there are up to a stop token, keep(n_tokens) of each step committed.

    settings: as `options.generate_params` takes them.
    """
    core = session._core.session
    params, _arrays = options.generate_params(budget=budget, chain=chain, **{**DEFAULTS, **settings})
    check(lib.pf_session_reset(core))
    check(lib.pf_session_configure(core, params))
    check(lib.pf_session_constrain(core, constraint.attach() if constraint else ffi.NULL))
    check(lib.pf_session_append(core, prompt, len(prompt)))
    step = ffi.new("pf_step_result *", {"size": ffi.sizeof("pf_step_result")})
    said = Said([], 0, [], [], [])
    n_steps = 0
    stopped = False
    while len(said.ids) < n and not stopped:
        status = lib.pf_session_step(core, min(n - len(said.ids), lib.PF_MAX_NODES), step)
        constraint.check(status) if constraint else check(status)
        n_steps += 1
        n_kept = keep(step.n_tokens)
        stopped = bool(step.stopped) and n_kept == step.n_tokens
        said.ids.extend(step.tokens[0:n_kept])
        if params.n_logprobs >= 0:
            for kept, all_of_them in zip(said[2:], logprobs(session, step.n_tokens, params.n_logprobs), strict=True):
                kept.extend(all_of_them[:n_kept].tolist())
        check(lib.pf_session_commit(core, n_kept, ffi.NULL))
        if constraint:
            constraint.commit(list(step.tokens[0:n_kept]))
    return said._replace(n_steps=n_steps)


def logprobs(session: Session, n_tokens: int, n_top: int) -> tuple[Any, Any, Any]:
    """Of the last step: float32 [n_tokens], int32 [n_tokens, n_top], float32 [n_tokens, n_top]."""
    out = np.zeros(n_tokens, np.float32), np.zeros((n_tokens, n_top), np.int32), np.zeros((n_tokens, n_top), np.float32)
    pointers = (
        ffi.from_buffer(f"{kind}[]", array) if array.size else ffi.new(f"{kind}[1]")
        for kind, array in zip(("float", "int32_t", "float"), out, strict=True)
    )
    check(lib.pf_session_logprobs(session._core.session, *pointers))
    return out
