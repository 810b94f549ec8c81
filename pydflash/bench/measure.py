"""The runs: every arm continues every prompt in every round, and says what plain decoding says.

Arms take turns prompt by prompt, each time in another order, so that a noisy machine is noisy for all of them, and none
always finds the caches as the same other one left them. They share one session: what stands before the answer is
evaluated once a prompt and round, outside of the clock.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydflash.bench import answers, prompts
from pydflash.bench.figures import Run, loops
from pydflash.bench.floor import Floor
from pydflash.bench.prompts import Prompt

if TYPE_CHECKING:
    import pydflash

SEED = 1  # of sampled runs; a prompt's number is added


@dataclass(frozen=True)
class Arm:
    """A way of decoding: what `Session.generate` is given. The one named "plain" is what others are held against."""

    name: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Part:
    """What is measured together: prompts behind `depth` tokens of a document, at one temperature."""

    prompts: Sequence[Prompt]
    depth: int = 0
    temperature: float = 0.0


@dataclass
class Measured:
    """All that was found, as it comes in: whoever is interrupted has what was there by then.

    prefill_seconds: by depth, of the document as a whole. costs: by depth, what passes take there.
    """

    runs: list[Run] = field(default_factory=list)
    partings: list[answers.Parting] = field(default_factory=list)
    prefill_seconds: dict[int, float] = field(default_factory=dict)
    costs: dict[int, pydflash.Costs] = field(default_factory=dict)
    floor: Floor | None = None


def arms(session: pydflash.Session, kinds: Sequence[str], budgets: Sequence[int]) -> list[Arm]:
    """Plain decoding and, with a drafter, the kinds wanted of "chain", "tree" (one a budget) and "auto"."""
    made = [Arm("plain", {"budget": 0})]
    if session.block_size and "chain" in kinds:
        made.append(Arm("chain", {"budget": session.block_size - 1, "chain": True}))
    if session.block_size and "tree" in kinds:
        made += [Arm(f"tree {n}", {"budget": n, "chain": False}) for n in budgets]
    if session.block_size and "auto" in kinds:
        made.append(Arm("auto", {"budget": "auto"}))
    return made


def parts(
    categories: Sequence[Sequence[Prompt]], depths: Sequence[int], temperature: float, *, n_deep: int
) -> list[Part]:
    """At depth 0 all prompts greedily, and the first category at the temperature, 0 of which leaves that out; at the
    other depths the first `n_deep` of that category."""
    made = []
    if 0 in depths:
        made.append(Part([prompt for category in categories for prompt in category]))
        if temperature:
            made.append(Part(categories[0], temperature=temperature))
    return made + [Part(categories[0][:n_deep], depth) for depth in sorted(set(depths) - {0})]


def measure(
    session: pydflash.Session,
    ways: Sequence[Arm],
    parts: Sequence[Part],
    *,
    n_gen: int,
    rounds: int,
    tie: float,
    out: Measured,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Runs all parts and fills `out`. tie: the largest margin at which an arm may part from plain decoding.

    Raises WrongAnswerError, and what `Session.generate` does.
    """
    measured = _Measuring(session, ways, n_gen, tie, out)
    total = rounds * len(ways) * sum(len(part.prompts) for part in parts)
    document = prompts.document(session, max((part.depth for part in parts), default=0))
    for part in parts:
        if part.depth and part.depth not in out.prefill_seconds:
            session.reset()
            started = time.perf_counter()
            session.append(document[: part.depth])
            out.prefill_seconds[part.depth] = time.perf_counter() - started
        measured.warm_up(part, document)
        for number in range(rounds):
            for prompt in part.prompts:
                measured.prompt(part, prompt, document, number)
                progress(len(out.runs), total)
        if part.depth not in out.costs:
            out.costs[part.depth] = session.costs()


@dataclass
class _Measuring:
    session: pydflash.Session
    ways: Sequence[Arm]
    n_gen: int
    tie: float
    out: Measured

    def run(self, way: Arm, part: Part, prompt: Prompt, document: Sequence[int]) -> pydflash.Result:
        return self.session.generate(
            [*document[: part.depth], *prompt.ids],
            max_tokens=self.n_gen,
            ignore_eos=True,
            temperature=part.temperature,
            seed=SEED + prompt.number,
            **way.settings,
        )

    def warm_up(self, part: Part, document: Sequence[int]) -> None:
        """What only a first run finds cold: graphs of new shapes, and costs that are not known this deep."""
        by_length = sorted(part.prompts, key=lambda prompt: len(prompt.ids))
        for i in {0, len(by_length) // 2, len(by_length) - 1}:
            for way in self.ways:
                self.run(way, part, by_length[i], document)

    def prompt(self, part: Part, prompt: Prompt, document: Sequence[int], number: int) -> None:
        """One prompt in one round: every arm, in an order that is drawn, but the same in every run of the benchmark."""
        order = random.Random(f"{prompt.category} {prompt.number} {number}").sample(self.ways, len(self.ways))
        said: dict[str, list[int]] = {}
        for way in order:
            result = self.run(way, part, prompt, document)
            said[way.name] = result.ids
            self.out.runs.append(_as_run(way.name, part, prompt, number, result))
        partings = answers.compare(
            self.session,
            [*document[: part.depth], *prompt.ids],
            said.pop("plain"),
            said,
            category=prompt.category,
            number=prompt.number,
            depth=part.depth,
            temperature=part.temperature,
            seed=SEED + prompt.number,
            tie=self.tie,
        )
        self.out.partings += [parting for parting in partings if parting not in self.out.partings]


def _as_run(arm: str, part: Part, prompt: Prompt, number: int, result: pydflash.Result) -> Run:
    stats = result.stats
    offered = stats.offered_by_depth
    return Run(
        arm=arm,
        category=prompt.category,
        prompt=prompt.number,
        round=number,
        n_tokens=stats.n_generated,
        seconds=stats.n_generated / stats.decode_tps,
        output_hash=stats.output_hash,
        depth=part.depth,
        temperature=part.temperature,
        n_steps=stats.n_steps,
        n_drafted=stats.n_drafted,
        expected=stats.mean_expected * stats.n_steps,
        ms=stats.ms,
        offered=offered,
        reached=[round(share * n) for share, n in zip(stats.accepted_by_depth, offered, strict=True)],
        loops=loops(result.ids),
    )
