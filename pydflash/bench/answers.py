"""Whether all ways of decoding say the same, and if not, whether the model could not choose.

With F32 weights and an F32 cache they say the same to the token. Sums that are rounded in another order, over numbers
of fewer bits, may turn a tie: there the text goes on differently, and rightly so. Owns the line between the two: the
margin, which is by how much the model preferred one token to the other, and how large it may be for each number format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydflash import options
from pydflash._gguf import Gguf
from pydflash._lib import check, ffi, lib
from pydflash.errors import PydflashError

if TYPE_CHECKING:
    import os

    import pydflash

# The largest margin, in logits, that counts as a tie. Between plain decoding and trees of the small pair the lead of
# the best logit changes by at most 0.006 with F16 weights, 0.008 with a Q4_0 cache as well, 0.11 with Q4_K_M weights.
TIES = {"f32": 0.002, "f16": 0.03, "bf16": 0.03, "q8_0": 0.15}  # by the type of weights
TIE_OF_FEWER_BITS = 0.5
TIE_OF_CACHES = 0.05  # that are not f32


class WrongAnswerError(PydflashError):
    """Drafting has changed what is said where there was no tie."""


@dataclass(frozen=True)
class Parting:
    """Where an arm left the path of plain decoding: at output token `at` it said `said` instead of `plain`.

    margin: how far logits have to move against one another for the choice to turn.
    """

    arm: str
    category: str
    prompt: int
    depth: int
    temperature: float
    at: int
    plain: str
    said: str
    margin: float

    def __str__(self) -> str:
        where = f"{self.category} prompt {self.prompt}" + (f" behind {self.depth} tokens" if self.depth else "")
        return (
            f"{self.arm} says {self.said} where plain decoding says {self.plain}: {where}, temperature "
            f"{self.temperature:g}, output token {self.at}, {self.margin:.4f} logits apart"
        )


def largest_tie(session: pydflash.Session, target: str | os.PathLike[str]) -> float:
    """The largest margin that counts as a tie with these weights and caches: that of the coarsest of their types."""
    with Gguf(target) as file:
        ties = [TIES.get(tensor.type, TIE_OF_FEWER_BITS) for tensor in file.tensors()]
    return max(*ties, *(TIES["f32"] if name == "f32" else TIE_OF_CACHES for name in session.plan.kv_type))


def parted(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Where two texts of one length part; None where they do not."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def compare(
    session: pydflash.Session,
    prompt: Sequence[int],
    plain: Sequence[int],
    said: Mapping[str, Sequence[int]],
    *,
    category: str,
    number: int,
    depth: int,
    temperature: float,
    seed: int,
    tie: float,
) -> list[Parting]:
    """The places where arms part from plain decoding of this prompt. WrongAnswerError where that is no tie."""
    found = []
    for arm, ids in said.items():
        at = parted(plain, ids)
        if at is None:
            continue
        before = [*prompt, *plain[:at]]
        if temperature > 0:
            apart = drawn_margin(session, before, plain[at], ids[at], temperature, seed)
        else:
            apart = greedy_margin(session, before, plain[at], ids[at])
        a, b = (spelt(session, token) for token in (plain[at], ids[at]))
        parting = Parting(arm, category, number, depth, temperature, at, a, b, apart)
        if not apart <= tie:
            raise WrongAnswerError(f"{parting}, which is no tie (up to {tie:g} is, with these number formats)")
        found.append(parting)
    return found


def greedy_margin(session: pydflash.Session, ids: Sequence[int], a: int, b: int) -> float:
    """How far apart the target's logits of two tokens are behind these ids; infinite when one of them is none of the
    likeliest."""
    result = session.generate(ids, budget=0, max_tokens=1, temperature=0, ignore_eos=True, logprobs=lib.PF_MAX_LOGPROBS)
    assert result.logprobs is not None
    logp = dict(result.logprobs[0].top)
    return abs(logp[a] - logp[b]) if a in logp and b in logp else float("inf")


def drawn_margin(session: pydflash.Session, ids: Sequence[int], a: int, b: int, temperature: float, seed: int) -> float:
    """How far the logits on one side of the border that lies between two tokens have to move against those on the other
    for the draw behind these ids to cross it, from `a` to b. Replaces the timeline.

    A draw is the token whose stretch of [0, 1) holds a random number, the stretches lying in the order of ids.
    """
    import numpy as np

    row = session.logits(ids)[-1]
    border, up = (b, 0.5) if b > a else (b + 1, -0.5)
    side = np.where(np.arange(len(row)) < border, -up, up).astype(np.float32)
    params, _keep = options.generate_params(
        temperature=temperature, seed=seed, top_k=0, top_p=1, min_p=0, budget=0, chain=False, stop_ids=[]
    )
    token = ffi.new("int32_t *")

    def turned(margin: float) -> bool:
        given = ffi.from_buffer("float[]", row + np.float32(margin) * side)
        check(lib.pf_sample(given, len(row), params, ffi.NULL, 0, 0, len(ids), token))
        return bool(token[0] <= b if b < a else token[0] >= b)

    low, high = 0.0, 64.0
    if turned(low):
        return low
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if turned(middle) else (middle, high)
    return high


def spelt(session: pydflash.Session, token: int) -> str:
    """A token for people to read."""
    return str(token) if session.tokenizer is None else repr(session.detokenize([token]))
