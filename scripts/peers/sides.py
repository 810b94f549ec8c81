"""The runs: every arm of both engines continues every prompt in every round, and all say the same.

Arms take turns prompt by prompt, in an order that is drawn each time; between turns an engine stands still. Where the
engines would not fit into memory together, they are opened one after another, and rounds are not interleaved. Knows
arms and prompts; what an engine is, is `engines`' to know.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import Any

import pydflash
from peers.engines import Answer, Engine
from pydflash.bench import answers
from pydflash.bench.answers import Parting
from pydflash.bench.figures import Run, loops
from pydflash.bench.prompts import Prompt
from pydflash.results import output_hash

Question = tuple[str, int, int, float]  # see figures.Run.question
PLAIN = "plain"  # ours; what every other arm's text is held against
PEER = "llama.cpp"  # without a drafter, the arm and its engine
PLAIN_ENGINE, ENGINE = "pydflash", "pydflash with the drafter"
SETTLE = 0.02  # seconds between turns: what was spinning has stopped
N_READ = 5  # times that a prefill is measured
N_WARM = 16  # tokens that are thrown away first


@dataclass(frozen=True)
class Arm:
    """A way of decoding. engine: a name; settings: what its `generate` is given.

    checked: its text is the target's. reads: prefill is measured with it.
    """

    name: str
    engine: str
    settings: dict[str, Any] = field(default_factory=dict)
    checked: bool = True
    reads: bool = False


@dataclass(frozen=True)
class Case:
    """A prompt behind `depth` tokens of a document, ready as ids."""

    prompt: Prompt
    depth: int
    ids: Sequence[int]

    @property
    def question(self) -> Question:
        return self.prompt.category, self.prompt.number, self.depth, 0.0


@dataclass
class Measured:
    """What was found with one target and one number of threads.

    prefill: by engine and number of tokens, tokens a second of each time. wall: by arm, seconds of all runs, and what
    of them the engine's own clock gives. about, memory, open_seconds: by engine.
    """

    runs: list[Run] = field(default_factory=list)
    prefill: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    wall: dict[str, tuple[float, float]] = field(default_factory=dict)
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    open_seconds: dict[str, float] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    partings: list[Parting] = field(default_factory=list)
    said: dict[tuple[str, Question], list[list[int]]] = field(default_factory=dict)  # by arm, each text once
    forbidden: list[int] = field(default_factory=list)  # what an engine never says, and none may


def measure(
    open_engine: Callable[[str], Engine],
    arms: Sequence[Arm],
    cases: Sequence[Case],
    prefills: Sequence[Sequence[int]],
    *,
    n_gen: int,
    rounds: int,
    together: bool,
    progress: Callable[[str], None] = lambda what: None,
) -> Measured:
    """Runs everything. prefills: prompts of which only the reading is measured, N_READ times.

    Raises EngineError.
    """
    out = Measured()
    groups = [list(arms)] if together else [[a for a in arms if a.engine == e] for e in _engines(arms)]
    for group in groups:
        with ExitStack() as stack:
            engines = {}
            for name in _engines(group):
                progress(f"opening {name}")
                start = time.perf_counter()
                engines[name] = stack.enter_context(closing(open_engine(name)))
                out.open_seconds[name] = time.perf_counter() - start
                out.about[name] = engines[name].about
                out.forbidden = sorted({*out.forbidden, *engines[name].forbidden})
                with engines[name].turn():
                    pass
            readers = [arm for arm in group if arm.reads]
            for ids in prefills:
                progress(f"prefill of {len(ids)} tokens")
                for number in range(N_READ + 1):
                    for arm in _turned(readers, number):
                        answer = _ask(out, engines[arm.engine], arm, ids, 1)
                        if number:  # the first finds everything cold
                            rates = out.prefill.setdefault(arm.engine, {}).setdefault(len(ids), [])
                            rates.append(answer.prefill_rate)
            warm = {case.depth: case for case in cases}
            for arm in group:
                for case in warm.values():
                    fewer = {"n_passes": 1} if "n_passes" in arm.settings else {}
                    short = replace(arm, settings=arm.settings | fewer)
                    _ask(out, engines[arm.engine], short, case.ids, min(N_WARM, n_gen))
            for number in range(rounds):
                for i, case in enumerate(cases):
                    progress(f"round {number + 1} of {rounds}, prompt {i + 1} of {len(cases)}")
                    for arm in _turned(group, number * len(cases) + i):
                        answer = _ask(out, engines[arm.engine], arm, case.ids, n_gen)
                        _keep(out, arm, case, number, answer)
                        if case.depth and arm in readers:
                            rates = out.prefill.setdefault(arm.engine, {}).setdefault(case.depth, [])
                            rates.append(answer.prefill_rate)
            out.memory |= {name: engine.memory() for name, engine in engines.items()}
    return out


def check(out: Measured, arms: Sequence[Arm], cases: Sequence[Case], session: pydflash.Session, tie: float) -> None:
    """Notes where arms part from our plain decoding. WrongAnswerError where the target could choose there.

    session: of the target, to look at how far apart its choices are. tie: see `answers.largest_tie`.
    """
    for case in cases:
        plain = out.said[PLAIN, case.question][0]
        texts = [(arm.name, said) for arm in arms if arm.checked for said in out.said[arm.name, case.question]]
        for name, said in texts:
            out.partings += answers.compare(
                session,
                case.ids,
                plain[: len(said)],
                {name: said[: len(plain)]},
                category=case.prompt.category,
                number=case.prompt.number,
                depth=case.depth,
                temperature=0.0,
                seed=0,
                tie=tie,
            )


def _ask(out: Measured, engine: Engine, arm: Arm, ids: Sequence[int], n_tokens: int) -> Answer:
    with engine.turn():
        answer = engine.generate(ids, n_tokens, arm.settings, out.forbidden)
    time.sleep(SETTLE)
    return answer


def _keep(out: Measured, arm: Arm, case: Case, number: int, answer: Answer) -> None:
    texts = out.said.setdefault((arm.name, case.question), [])
    if answer.ids not in texts:  # another one than in the first round: the budget may be chosen otherwise
        texts.append(answer.ids)
    wall, own = out.wall.get(arm.name, (0.0, 0.0))
    out.wall[arm.name] = wall + answer.wall_seconds, own + answer.prefill_seconds + answer.decode_seconds
    out.runs.append(
        Run(
            arm=arm.name,
            category=case.prompt.category,
            prompt=case.prompt.number,
            round=number,
            n_tokens=answer.n_decoded,
            seconds=answer.decode_seconds,
            output_hash=output_hash(answer.ids),
            depth=case.depth,
            n_steps=answer.n_passes,
            n_drafted=answer.n_drafted,
            ms=answer.ms,
            loops=loops(answer.ids),
        )
    )


def _engines(arms: Iterable[Arm]) -> list[str]:
    return list(dict.fromkeys(arm.engine for arm in arms))


def _turned(arms: list[Arm], turn: int) -> list[Arm]:
    """In an order that is drawn, but the same in every run of the benchmark."""
    return random.Random(turn).sample(arms, len(arms))
