"""Our engine behind lines of JSON: the first opens a session, each that follows is a run. See engines.LinesEngine.

A run with "n_passes" ends behind so many passes, all of them whole; with "accepted" too, each accepts exactly so many
tokens of a chain of N_LINE: what the target says is rehearsed first, off the clock, and proposed with wrong tokens
behind. What is said is still the target's choice, pass by pass.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pydflash
from pydflash._lib import check, lib

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measuring import Timeline

N_LINE = 15  # tokens that are proposed for a pass


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed is no answer
    session: pydflash.Session | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if session is None:
                session = pydflash.Session(**asked, kv_type="f16", device="cpu")
                reply = {"version": pydflash.__version__}
            else:
                reply = run(session, **asked)
        except pydflash.PydflashError as error:
            reply = {"error": f"pydflash: {error}"}
        answers.write(json.dumps(reply) + "\n")


def run(
    session: pydflash.Session, ids: list[int], n_tokens: int, forbidden: list[int], **settings: Any
) -> dict[str, Any]:
    """The fields of an engines.Answer."""
    if "n_passes" in settings:
        return passes(session, ids, **settings)
    session.reset()
    greedy: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "logit_bias": dict.fromkeys(forbidden, -math.inf)}
    result = session.generate(ids, max_tokens=n_tokens, **greedy, **settings)
    stats = result.stats
    return {
        "ids": result.ids,
        "n_prefilled": stats.n_prompt - 1,
        "prefill_seconds": stats.prefill_ms / 1e3,
        "n_decoded": stats.n_generated,
        "decode_seconds": stats.n_generated / stats.decode_tps,
        "n_passes": stats.n_steps,
        "n_drafted": stats.n_drafted,
        "ms": stats.ms,
    }


def passes(
    session: pydflash.Session, ids: list[int], n_passes: int, accepted: int | None = None, **shape: Any
) -> dict[str, Any]:
    """So many whole passes of one shape, a chain of N_LINE where that many tokens are to be accepted."""
    if accepted is not None:
        shape = {"budget": N_LINE, "chain": True}
    timeline = Timeline(session)
    prefill_seconds = timeline.append(ids)
    said: list[int] = []
    seconds = 0.0
    ms: dict[str, float] = {}
    for _ in range(n_passes):
        if accepted is not None:
            *right, end = rehearsed(session, timeline, accepted)
            propose(session, [*right, *[(end + 1) % session.n_vocab] * (N_LINE - len(right))])
        step = timeline.decode(N_LINE + 1, n_steps=1, **shape)
        said += step.ids
        seconds += step.seconds[0]
        ms = {part: ms.get(part, 0.0) + spent[0] for part, spent in step.ms.items()}
    return {
        "ids": said,
        "n_prefilled": len(ids) - 1,
        "prefill_seconds": prefill_seconds,
        "n_decoded": len(said),
        "decode_seconds": seconds,
        "n_passes": n_passes,
        "n_drafted": n_passes * shape["budget"],
        "ms": ms,
    }


def rehearsed(session: pydflash.Session, timeline: Timeline, n_tokens: int) -> list[int]:
    """What the target says next in a pass over a whole line, which rounds otherwise than passes over one token do.

    Plain decoding guesses, such a pass says how far that is right, and the next guess goes on from there. The timeline
    stands afterwards where it stood.
    """
    mark = timeline.mark()
    said: list[int] = []
    while len(said) < n_tokens:
        guess = said + timeline.decode(N_LINE - len(said), budget=0).ids
        timeline.back_to(mark)
        propose(session, guess)
        said = timeline.decode(N_LINE + 1, budget=N_LINE, chain=True, n_steps=1).ids
    timeline.back_to(mark)
    return said[:n_tokens]


def propose(session: pydflash.Session, line: list[int]) -> None:
    """A line for the next pass, taken for certain."""
    check(lib.pf_session_propose(session._core.session, line, len(line)))


if __name__ == "__main__":
    main()
