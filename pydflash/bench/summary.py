"""What the benchmark says of what it measured: tables and sentences, and the same as data.

Every table can be made of half the runs, since who is interrupted wants to see those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pydflash.bench.figures import PARTS, Figures, Run, best_fixed, figures, grouped
from pydflash.bench.floor import Floor
from pydflash.bench.measure import Measured
from pydflash.bench.report import Block, Table

N_POSITIONS = 15  # of a path, in the table: a block of 16 has so many behind the pending token


def blocks(measured: Measured, about: Sequence[str]) -> list[Block]:
    """The whole report. about: paragraphs on what was measured, where, and how."""
    runs = measured.runs
    shallow = [run for run in runs if not run.depth]
    greedy = [run for run in shallow if not run.temperature]
    out: list[Block] = list(about)
    if not runs:
        return [*out, "Nothing was measured."]
    out += _answers(measured)
    if shallow:
        out += ["Tokens per second, and of each way its ratio to plain: median (quartiles) over prompts and rounds."]
        out += [_speeds(shallow)]
        out += [
            "Tokens per target pass, and how many of plain decoding's texts end in a loop, which any drafter predicts."
        ]
        out += [_passes(shallow)]
    if greedy:
        out += [_of_a_step(measured.floor), _steps(greedy, measured.floor)]
    if any(run.offered for run in greedy):
        out += ["How often the token at each position of the path offered was accepted, greedy, all categories."]
        out += [_positions(figures(greedy))]
    if measured.costs:
        out += ["The curve: milliseconds of a target pass over so many nodes, with its commit, and of a draft."]
        out += [_curve(measured)]
    if any(run.depth for run in runs):
        speeds, passes = _depths(measured)
        out += ["Behind a long document, greedy, the same prompts at every depth.", speeds]
        out += ["Tokens per target pass there.", passes]
    if any(run.arm == "auto" for run in shallow):
        out += ["The automatic budget against the fastest of the other ways of its row."]
        out += [_auto(shallow)]
    return out


def _answers(measured: Measured) -> list[str]:
    n = len({(run.arm, *run.question) for run in measured.runs if run.arm != "plain"})
    parted = measured.partings
    if not n:
        return []
    if not parted:
        return [f"All {n:,} texts are those of plain decoding, to the token."]
    widest = max(parted, key=lambda parting: parting.margin)
    return [
        f"{n - len(parted):,} of {n:,} texts are those of plain decoding, to the token; the others leave it where the "
        f"model could not choose. The widest of these ties: {widest}."
    ]


def _named(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by what a row is of: a category, sampled or not; all that are greedy come last of the greedy ones."""
    rows: dict[str, list[Run]] = {}
    for temperature, group in grouped(runs, lambda run: run.temperature).items():
        suffix = f", temperature {temperature:g}" if temperature else ""
        categories = grouped(group, lambda run: run.category)
        rows.update({f"{category}{suffix}": found for category, found in categories.items()})
        if len(categories) > 1:
            rows[f"all{suffix}"] = group
    return rows


def _ratios(found: dict[str, Figures], arms: Sequence[str]) -> list[str]:
    """Tokens per second of plain decoding, and the ratio of each arm."""
    plain = found.get("plain")
    cells = ["-" if plain is None else f"{plain.tokens_per_second.median:,.{_digits(plain)}f}"]
    return cells + [str(found[arm].ratio or "-") if arm in found else "-" for arm in arms]


def _digits(found: Figures) -> int:
    return 0 if found.tokens_per_second.median >= 100 else 2


def _arms(runs: Sequence[Run]) -> list[str]:
    return sorted({run.arm for run in runs} - {"plain"}, key=arm_order)


def arm_order(arm: str) -> tuple[int, int]:
    """Plain, chain, trees by budget, auto; arms take turns, so that any may be the first to be measured."""
    kind, _, budget = arm.partition(" ")
    known = ("plain", "chain", "tree", "auto")
    return known.index(kind) if kind in known else len(known), int(budget) if budget.isdigit() else 0


def _speeds(runs: Sequence[Run]) -> Table:
    arms = _arms(runs)
    rows = [[name, *_ratios(figures(group), arms)] for name, group in _named(runs).items()]
    return Table(["", "plain tokens/s", *arms], rows)


def _passes(runs: Sequence[Run]) -> Table:
    arms = _arms(runs)
    rows = []
    for name, group in _named(runs).items():
        texts = {run.question: run.loops for run in group if run.arm == "plain"}
        rows.append([name, *_per_pass(figures(group), arms), f"{sum(texts.values())} of {len(texts)}"])
    return Table(["", *arms, "looping"], rows)


def _of_a_step(floor: Floor | None) -> str:
    least = "" if floor is None else f" The floor, of the target's pass alone: {floor}."
    return (
        "A step, greedy, all categories: the tokens it gave, those that its tree had promised, its nodes, and "
        f"milliseconds by part.{least}"
    )


def _steps(runs: Sequence[Run], floor: Floor | None) -> Table:
    rows = []
    found = figures(runs)
    for arm in sorted(found, key=arm_order):
        f = found[arm]
        parts = [f"{f.step_ms.get(part, 0):.3f}" for part in PARTS]
        least = "-" if floor is None else f"{floor.step_ms(f.nodes_per_pass):.3f}"
        speed = f"{f.tokens_per_second.median:,.{_digits(f)}f}"
        counts = [f"{f.tokens_per_pass:.2f}", f"{f.expected_per_pass:.2f}", f"{f.nodes_per_pass:.1f}"]
        rows.append([arm, speed, *counts, *parts, least])
    return Table(["", "tokens/s", "tokens", "promised", "nodes", *PARTS, "floor"], rows)


def _curve(measured: Measured) -> Table:
    n_nodes = sorted({n for costs in measured.costs.values() for n in costs.pass_ms})
    rows = []
    for depth, costs in measured.costs.items():
        passes = [f"{costs.pass_ms[n]:.3f}" if n in costs.pass_ms else "-" for n in n_nodes]
        rows.append([f"{depth:,}", *passes, "-" if costs.draft_ms is None else f"{costs.draft_ms:.3f}"])
    return Table(["tokens before", *(f"{n}" for n in n_nodes), "draft"], rows)


def _positions(found: dict[str, Figures]) -> Table:
    arms = [arm for arm in sorted(found, key=arm_order) if found[arm].accepted]
    n = min(N_POSITIONS, max((len(found[arm].accepted) for arm in arms), default=0))
    rows = []
    for arm in arms:
        shares = found[arm].accepted[:n]
        rows.append([arm, *(f"{share:.2f}" for share in shares), *["-"] * (n - len(shares))])
    return Table(["", *map(str, range(1, n + 1))], rows)


def at_every_depth(runs: Sequence[Run]) -> dict[int, list[Run]]:
    """Greedy runs of the prompts that were run behind a document too, by its depth."""
    greedy = [run for run in runs if not run.temperature]
    deep = {(run.category, run.prompt) for run in greedy if run.depth}
    return grouped((run for run in greedy if (run.category, run.prompt) in deep), lambda run: run.depth)


def _depths(measured: Measured) -> tuple[Table, Table]:
    """Speed, and tokens a pass."""
    by_depth = at_every_depth(measured.runs)
    arms = _arms([run for group in by_depth.values() for run in group])
    speeds, passes = [], []
    for depth, group in by_depth.items():
        seconds = measured.prefill_seconds.get(depth)
        prefill = "-" if seconds is None else f"{depth / seconds:,.0f}"
        speeds.append([f"{depth:,}", prefill, *_ratios(figures(group), arms)])
        passes.append([f"{depth:,}", *_per_pass(figures(group), arms)])
    return (
        Table(["tokens before", "prefill tokens/s", "plain tokens/s", *arms], speeds),
        Table(["tokens before", *arms], passes),
    )


def _per_pass(found: dict[str, Figures], arms: Sequence[str]) -> list[str]:
    return [f"{found[arm].tokens_per_pass:.2f}" if arm in found else "-" for arm in arms]


def _auto(runs: Sequence[Run]) -> Table:
    rows = []
    for name, group in _named(runs).items():
        best = best_fixed(group)
        if best is not None:
            rows.append([name, best[0], str(best[1])])
    return Table(["", "fastest of the others", "auto"], rows)


def as_data(measured: Measured, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything, for JSON."""
    return {
        "settings": settings,
        "figures": as_rows(measured.runs),
        "floor": None if measured.floor is None else asdict(measured.floor),
        "prefill_seconds": measured.prefill_seconds,
        "costs": {depth: asdict(costs) for depth, costs in measured.costs.items()},
        "partings": [asdict(parting) for parting in measured.partings],
        "runs": [asdict(run) for run in measured.runs],
    }


def as_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The figures of every arm by category, depth and temperature, for CSV."""
    rows = []
    for key, group in grouped(runs, lambda run: (run.category, run.depth, run.temperature)).items():
        for found in sorted(figures(group).values(), key=lambda f: arm_order(f.arm)):
            speed, ratio = found.tokens_per_second, found.ratio
            row: dict[str, Any] = dict(zip(("category", "depth", "temperature"), key, strict=True))
            row |= {"arm": found.arm, "n_runs": found.n_runs, "tokens_per_second": speed.median}
            row |= {"tokens_per_second_low": speed.low, "tokens_per_second_high": speed.high}
            if ratio is not None:
                row |= {"of_plain": ratio.median, "of_plain_low": ratio.low, "of_plain_high": ratio.high}
            row |= {"tokens_per_pass": found.tokens_per_pass, "expected_per_pass": found.expected_per_pass}
            row |= {"nodes_per_pass": found.nodes_per_pass}
            row |= {f"{part}_ms": ms for part, ms in found.step_ms.items()}
            row |= {f"accepted_{i}": share for i, share in enumerate(found.accepted, 1)}
            rows.append({name: round(x, 5) if isinstance(x, float) else x for name, x in row.items()})
    return rows
