"""What runs amount to: medians with their spread, ratios of runs that belong together, tokens by the pass.

Knows runs as rows and nothing of who made them. Ratios are paired: two arms are compared prompt by prompt and round by
round, so that what a prompt is like, and what the machine did in that minute, is the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import TypeVar

Key = TypeVar("Key")
PARTS = ("draft", "build", "verify", "accept", "commit")  # of a decode step, in order


@dataclass(frozen=True)
class Run:
    """One prompt, continued once. depth: tokens of the document before it. seconds: of decoding alone.

    n_steps: target passes. n_drafted: nodes verified besides the roots. expected: tokens that the trees had promised,
    all together. ms: by part, sums over all steps.
    offered, reached: [d - 1]: steps that offered depth d, and those that accepted it. What is not known is left 0 or
    empty.
    """

    arm: str
    category: str
    prompt: int
    round: int
    n_tokens: int
    seconds: float
    output_hash: str = ""
    depth: int = 0
    temperature: float = 0.0
    n_steps: int = 0
    n_drafted: int = 0
    expected: float = 0.0
    ms: dict[str, float] = field(default_factory=dict)
    offered: list[int] = field(default_factory=list)
    reached: list[int] = field(default_factory=list)
    loops: bool = False  # see `loops`

    @property
    def tokens_per_second(self) -> float:
        return self.n_tokens / self.seconds

    @property
    def question(self) -> tuple[str, int, int, float]:
        """What was asked, whoever answered and whenever."""
        return self.category, self.prompt, self.depth, self.temperature


@dataclass(frozen=True)
class Spread:
    """A median, and the quartiles around it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Figures:
    """What the runs of an arm amount to.

    tokens_per_second: of a round, all its tokens over all its seconds. ratio: of speeds to the base arm's, run by run;
    None where none belong together. expected_per_pass: tokens that a tree promised. step_ms: by part, of one step.
    accepted: [k]: how often the path's token k was accepted where it was offered.
    """

    arm: str
    n_runs: int
    tokens_per_second: Spread
    ratio: Spread | None
    tokens_per_pass: float
    expected_per_pass: float
    nodes_per_pass: float  # the root counted
    step_ms: dict[str, float]
    accepted: list[float]


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value; quartiles by linear interpolation, as numpy has them."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, _, high = quantiles(values, n=4, method="inclusive")
    return Spread(median(values), low, high)


def ratios(runs: Iterable[Run], arm: str, base: str) -> list[float]:
    """Speed of `arm` over that of `base`, for each question and round that both have answered."""
    found: dict[str, dict[object, float]] = {arm: {}, base: {}}
    for run in runs:
        if run.arm in found:
            found[run.arm][run.question, run.round] = run.tokens_per_second
    return [speed / found[base][key] for key, speed in found[arm].items() if key in found[base]]


def figures(runs: Sequence[Run], base: str = "plain") -> dict[str, Figures]:
    """The figures of each arm, in the order in which the arms first appear."""
    return {arm: _figures(runs, arm, base) for arm in dict.fromkeys(run.arm for run in runs)}


def _figures(runs: Sequence[Run], arm: str, base: str) -> Figures:
    own = [run for run in runs if run.arm == arm]
    rounds = grouped(own, lambda run: run.round).values()
    paired = ratios(runs, arm, base)
    n_steps = sum(run.n_steps for run in own)
    offered, reached = (_summed(getattr(run, name) for run in own) for name in ("offered", "reached"))
    return Figures(
        arm=arm,
        n_runs=len(own),
        tokens_per_second=spread([sum(r.n_tokens for r in rs) / sum(r.seconds for r in rs) for rs in rounds]),
        ratio=spread(paired) if paired else None,
        tokens_per_pass=sum(run.n_tokens for run in own) / n_steps if n_steps else 0.0,
        expected_per_pass=sum(run.expected for run in own) / n_steps if n_steps else 0.0,
        nodes_per_pass=1 + sum(run.n_drafted for run in own) / n_steps if n_steps else 0.0,
        step_ms={part: sum(run.ms.get(part, 0.0) for run in own) / n_steps for part in PARTS} if n_steps else {},
        accepted=[r / o for r, o in zip(reached, offered, strict=True)],
    )


def best_fixed(runs: Sequence[Run], arm: str = "auto", base: str = "plain") -> tuple[str, Spread] | None:
    """The fastest of the other arms by its median ratio to `base`, itself included, and `arm`'s ratio to it."""
    others = {name: found.ratio for name, found in figures(runs, base).items() if name != arm}
    rated = {name: ratio.median for name, ratio in others.items() if ratio is not None}
    if not rated:
        return None
    best = max(rated, key=lambda name: rated[name])
    paired = ratios(runs, arm, best)
    return (best, spread(paired)) if paired else None


def grouped(runs: Iterable[Run], key: Callable[[Run], Key]) -> dict[Key, list[Run]]:
    """The runs by a key, in the order in which keys first appear."""
    found: dict[Key, list[Run]] = {}
    for run in runs:
        found.setdefault(key(run), []).append(run)
    return found


def loops(ids: Sequence[int], tail: int = 24, longest: int = 12) -> bool:
    """Whether the last `tail` tokens repeat with a period of at most `longest`: every drafter predicts those."""
    return len(ids) >= tail + longest and any(
        all(ids[-i] == ids[-i - p] for i in range(1, tail + 1)) for p in range(1, longest + 1)
    )


def _summed(rows: Iterable[list[int]]) -> list[int]:
    total: list[int] = []
    for row in rows:
        total += [0] * (len(row) - len(total))
        for i, count in enumerate(row):
            total[i] += count
    return total
