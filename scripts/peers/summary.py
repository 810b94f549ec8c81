"""What was found, as tables: the aims first, then speeds by category, passes, prefill, memory."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from peers.sides import ENGINE, PEER, PLAIN, PLAIN_ENGINE, Measured
from pydflash.bench.figures import Figures, Run, Spread, figures, grouped, ratios, spread
from pydflash.bench.report import Block, Table

DRAFTED = f"{PEER} chain "  # how the names of the peer's drafting arms begin


def aims(found: Measured) -> Table:
    """What is aimed at, what came of it, and where it was worst."""
    rows = [[name, f"{aim:.2f}", *_judged(values, aim)] for name, aim, values in _aims(found) if values]
    return Table(["", "aim", "median (quartiles)", "lowest", "reached"], rows)


def _drafting(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(DRAFTED)]


def _judged(values: dict[str, Spread], aim: float) -> list[str]:
    whole = values.get("all", next(iter(values.values())))
    worst = min(values, key=lambda name: values[name].median)
    return [str(whole), f"{values[worst].median:.2f}, {worst}", "yes" if values[worst].median >= aim else "no"]


def _aims(found: Measured) -> Iterable[tuple[str, float, dict[str, Spread]]]:
    runs = [run for run in found.runs if not run.depth]
    chain = best(runs, DRAFTED)
    yield "plain to llama.cpp's plain", 1.0, {"all": spread(ratios(runs, PLAIN, PEER))}
    drafting = next(iter(_drafting(found.prefill)), PEER)
    for own, peer in ((PLAIN_ENGINE, PEER), (ENGINE, drafting)):
        if own in found.prefill:
            rates = {f"{n:,} tokens": _prefill(found, n, own, peer) for n in _lengths(found)}
            yield f"prefill, {own} to {peer}", 1.0, rates
    for kind in ("chain ", "tree "):
        fastest = best(runs, kind)
        if fastest and chain:
            yield f"{fastest} to {chain}", 1.3, {"all": spread(ratios(runs, fastest, chain))}
    if any(run.arm == "auto" for run in runs):
        better = _by_category(runs, "auto", lambda group: best(group, PEER) or PEER)
        yield "auto to the better of llama.cpp's, each category", 1.0, better
        yield "auto to the better of llama.cpp's, code", 1.2, {k: v for k, v in better.items() if k == "code"}
        yield "auto to plain, each category", 0.97, _by_category(runs, "auto", lambda group: PLAIN)
    peak = {name: m["peak"] for name, m in found.memory.items()}
    for own, peer in ((PLAIN_ENGINE, PEER), (ENGINE, min(_drafting(peak), key=lambda name: peak[name], default=""))):
        if own in peak and peer in peak:
            yield f"peak memory, {peer} to {own}", 1.0, {"all": spread([peak[peer] / peak[own]])}


def _by_category(runs: Sequence[Run], arm: str, base: Any) -> dict[str, Spread]:
    values = {str(name): ratios(group, arm, base(group)) for name, group in grouped(runs, lambda r: r.category).items()}
    if len(values) > 1:
        values["all"] = [ratio for group in values.values() for ratio in group]
    return {name: spread(group) for name, group in values.items() if group}


def best(runs: Sequence[Run], begin: str) -> str | None:
    """The fastest of the arms whose names begin so."""
    rated = {name: f.tokens_per_second.median for name, f in figures(runs).items() if name.startswith(begin)}
    return max(rated, key=lambda name: rated[name]) if rated else None


def speeds(runs: Sequence[Run]) -> Table:
    """By category: the fastest arm of each kind, its ratio to llama.cpp's plain; and auto to the better of llama.cpp's
    two and to our plain."""
    rows = []
    groups = dict(grouped(runs, lambda run: run.category))
    for name, group in {**groups, "all": list(runs)}.items() if len(groups) > 1 else groups.items():
        found = figures(group, PEER)
        cells = [str(name), _speed(found[PEER])]
        for begin in (DRAFTED, PLAIN, "chain ", "tree ", "auto"):
            arm = best(group, begin)
            suffix = "" if arm is None or arm == begin else f" [{arm[len(begin) :]}]"
            cells.append("-" if arm is None else f"{found[arm].ratio}{suffix}")
        for base in (best(group, PEER), PLAIN):
            paired = ratios(group, "auto", base) if base else []
            cells.append(str(spread(paired)) if paired else "-")
        rows.append(cells)
    return Table(
        [
            "",
            "llama.cpp, tokens/s",
            "llama.cpp's chain",
            "plain",
            "chain",
            "tree",
            "auto",
            "auto to the better of llama.cpp's",
            "auto to plain",
        ],
        rows,
    )


def passes(found: Measured, runs: Sequence[Run]) -> Table:
    """Every arm: speed, tokens and milliseconds of a pass, its text."""
    rows = []
    for arm, f in figures(runs, PEER).items():
        own = [run for run in runs if run.arm == arm]
        first = [run for run in own if run.round == 0]
        pass_ms = sum(run.seconds for run in own) / max(1, sum(run.n_steps for run in own)) * 1e3
        same = 0
        for run in first:
            said, plain = (found.said[name, run.question][0] for name in (arm, PLAIN))
            same += said[: len(plain)] == plain[: len(said)]
        text = hashlib.sha256("".join(run.output_hash for run in first).encode()).hexdigest()[:12]
        rows.append(
            [
                arm,
                _speed(f),
                str(f.ratio),
                f"{f.tokens_per_pass:.2f}",
                f"{f.nodes_per_pass:.1f}",
                f"{pass_ms:.3f}",
                f"{same} of {len(first)}",
                text,
            ]
        )
    rows.sort(key=lambda row: _order(row[0]))
    heads = ["", "tokens/s", "to llama.cpp's plain", "tokens a pass", "nodes", "ms a pass", "text as plain", "output"]
    return Table(heads, rows)


def costs(found: Measured) -> Table:
    """Passes of the same number of nodes side by side, and what so many accepted tokens a pass give."""
    ms = {arm: 1e3 * f.tokens_per_pass / f.tokens_per_second.median for arm, f in figures(found.runs).items()}
    pairs = [("1 node", 1, PEER, PLAIN)]
    pairs += [(f"{n + 1} nodes", 1, f"{DRAFTED}{n}", f"chain {n}") for n in (3, 7, 15)]
    pairs += [(f"16 nodes, {n} tokens", n, f"{PEER} of {n}", f"rehearsed {n}") for n in (6, 8)]
    rows = []
    for what, n, peer, own in pairs:
        if peer in ms and own in ms:
            cells = [what, f"{ms[peer]:.1f}", f"{ms[own]:.1f}", f"{ms[peer] / ms[own]:.2f}"]
            rows.append([*cells, f"{n * ms[PEER] / ms[peer]:.2f}", f"{n * ms[PLAIN] / ms[own]:.2f}"])
    heads = ["a pass", "llama.cpp, ms", "ours, ms", "llama.cpp's to ours", "speed to plain, llama.cpp", "ours"]
    return Table(heads, rows)


def prefill(found: Measured) -> Table:
    """Tokens a second of reading a prompt, and the ratio to llama.cpp's plain, round by round."""
    rows = []
    for name in sorted(found.prefill, key=_order):
        cells = [name]
        for n in _lengths(found):
            rates = found.prefill[name].get(n)
            cells += [f"{median(rates):,.0f}", str(_prefill(found, n, name, PEER))] if rates else ["-", "-"]
        rows.append(cells)
    heads = [head for n in _lengths(found) for head in (f"{n:,} tokens, a second", "to llama.cpp's plain")]
    return Table(["", *heads], rows)


def memory(found: Measured) -> Table:
    """Of each engine when everything has run."""
    rows = [
        [name, *(f"{m[part]:,.0f}" for part in ("peak", "anonymous", "files")), f"{found.open_seconds[name]:.2f}"]
        for name, m in sorted(found.memory.items(), key=lambda item: _order(item[0]))
    ]
    return Table(["", "peak RSS, MiB", "not of files", "of mapped files", "open, s"], rows)


def partings(found: Measured, cases: int) -> str:
    """Whether all said the same."""
    if not found.partings:
        return f"All arms said what plain decoding says to all {cases} prompts, to the token."
    by_arm = Counter(parting.arm for parting in found.partings)
    counts = ", ".join(f"{arm} {by_arm[arm]}" for arm in sorted(by_arm, key=_order))
    worst = max(found.partings, key=lambda parting: parting.margin)
    return (
        f"Of {cases} prompts some texts leave plain decoding's, each where the target could not choose ({counts}). The "
        f"least of these ties: {worst}."
    )


def blocks_of_costs(found: Measured) -> list[Block]:
    """The report where weights say nothing."""
    out: list[Block] = [costs(found), "Every arm.", passes(found, found.runs)]
    if found.prefill:
        out += ["Prefill.", prefill(found)]
    return [*out, "Memory.", memory(found)]


def blocks(found: Measured, cases: int) -> list[Block]:
    """The report of one target and one number of threads."""
    out: list[Block] = [aims(found)]
    for depth, group in grouped(found.runs, lambda run: run.depth).items():
        where = f", behind {depth:,} tokens" if depth else ""
        out += [f"By category{where}; of each kind the fastest arm, its size in brackets.", speeds(group)]
        out += [f"Every arm{where}.", passes(found, group)]
    if found.prefill:
        out += ["Prefill.", prefill(found)]
    return [*out, "Memory.", memory(found), partings(found, cases)]


def as_data(found: Measured) -> dict[str, Any]:
    """Everything but the texts, for JSON."""
    return {
        "aims": [
            {"aim": aim, "what": name, "found": {key: asdict(value) for key, value in values.items()}}
            for name, aim, values in _aims(found)
        ],
        "runs": [asdict(run) for run in found.runs],
        "prefill": found.prefill,
        "wall_and_own_seconds": found.wall,
        "memory_mib": found.memory,
        "open_seconds": found.open_seconds,
        "engines": found.about,
        "partings": [asdict(parting) for parting in found.partings],
    }


def _prefill(found: Measured, n: int, engine: str, base: str) -> Spread:
    pairs = zip(found.prefill[engine][n], found.prefill[base][n], strict=True)
    return spread([own / other for own, other in pairs])


def _lengths(found: Measured) -> list[int]:
    return sorted({n for rates in found.prefill.values() for n in rates})


def _speed(f: Figures) -> str:
    return f"{f.tokens_per_second.median:,.{0 if f.tokens_per_second.median >= 100 else 2}f}"


def _order(name: str) -> tuple[int, int]:
    kinds = (PEER, DRAFTED, "pydflash", PLAIN, "chain", "tree", "auto")
    kind = max((kind for kind in kinds if name.startswith(kind)), key=len, default="auto")
    return kinds.index(kind), next((int(word) for word in reversed(name.split()) if word.isdigit()), 0)
