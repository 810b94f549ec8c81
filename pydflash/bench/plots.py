"""The benchmark drawn, with matplotlib: speed against depth and against budget, and the parts of a step.

Needs the extra `bench`; nothing else here does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydflash.bench.figures import PARTS, figures, grouped
from pydflash.bench.measure import Measured
from pydflash.bench.summary import arm_order, at_every_depth
from pydflash.errors import DocumentError


def load() -> Any:
    """matplotlib.pyplot, drawing into files alone. DocumentError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise DocumentError(
            "plots are drawn by matplotlib, which is not installed: pip install 'pydflash[bench]'", reason="package"
        ) from None
    matplotlib.use("svg")
    # Text as text, and the same file for the same figures.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "pydflash", "font.size": 9})
    from matplotlib import pyplot

    return pyplot


def draw(measured: Measured, folder: Path) -> list[Path]:
    """Writes the plots that there are figures for, as SVG; gives their paths."""
    pyplot = load()
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, plot in (("depth", _depth), ("budget", _budget), ("phases", _phases), ("curve", _curve)):
        figure, axes = pyplot.subplots(figsize=(5.6, 3.4), layout="constrained")
        if plot(measured, axes):
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
            made.append(folder / f"bench-{name}.svg")
            figure.savefig(made[-1], metadata={"Date": None})
        pyplot.close(figure)
    return made


def _depth(measured: Measured, axes: Any) -> bool:
    """Tokens per second of each arm behind so many tokens; the prompts are those that were run at every depth."""
    by_depth = at_every_depth(measured.runs)
    if len(by_depth) < 2:
        return False
    found = [figures(runs) for runs in by_depth.values()]
    for arm in sorted(set.intersection(*map(set, found)), key=arm_order):
        axes.plot(range(len(found)), [f[arm].tokens_per_second.median for f in found], marker="o", ms=3, label=arm)
    axes.set_xticks(range(len(found)), [f"{depth:,}" for depth in by_depth])
    axes.set(xlabel="tokens before the prompt", ylabel="tokens/s", yscale="log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter("")
    return True


def _budget(measured: Measured, axes: Any) -> bool:
    """Speed of trees against plain decoding by their budget, a line a category; dashed: the automatic budget."""
    shallow = [run for run in measured.runs if not run.depth and not run.temperature]
    drawn = False
    for category, runs in grouped(shallow, lambda run: run.category).items():
        found = figures(runs)
        trees = {int(arm.split()[1]): f.ratio for arm, f in found.items() if arm.startswith("tree ")}
        points = [(budget, ratio.median) for budget, ratio in sorted(trees.items()) if ratio is not None]
        if points:
            (line,) = axes.plot(*zip(*points, strict=True), marker="o", ms=3, label=category)
            drawn = True
            auto = found.get("auto")
            if auto is not None and auto.ratio is not None:
                axes.axhline(auto.ratio.median, color=line.get_color(), ls="--", lw=0.8)
    axes.axhline(1, color="grey", lw=0.8)
    axes.set_xticks(sorted({int(run.arm.split()[1]) for run in shallow if run.arm.startswith("tree ")}))
    axes.set(xlabel="nodes of the tree (dashed: auto)", ylabel="speed, plain decoding = 1", ylim=(0, None))
    return drawn


def _phases(measured: Measured, axes: Any) -> bool:
    """Milliseconds of a step by part, and beside each the floor of its target pass."""
    found = figures([run for run in measured.runs if not run.depth and not run.temperature])
    arms = [arm for arm in sorted(found, key=arm_order) if found[arm].step_ms]
    if not arms:
        return False
    bottom = [0.0] * len(arms)
    for part in PARTS:
        heights = [found[arm].step_ms[part] for arm in arms]
        axes.bar(range(len(arms)), heights, 0.5, bottom=bottom, label=part)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    if measured.floor is not None:
        floors = [measured.floor.step_ms(found[arm].nodes_per_pass) for arm in arms]
        axes.bar([i + 0.38 for i in range(len(arms))], floors, 0.2, color="grey", label="floor")
    axes.set_xticks(range(len(arms)), arms)
    axes.set(ylabel="ms a step")
    return True


def _curve(measured: Measured, axes: Any) -> bool:
    """What a pass takes by its nodes, in passes of one node: the tokens it has to give. A line a depth; dotted: a draft
    besides."""
    for depth, costs in measured.costs.items():
        n_nodes = sorted(costs.pass_ms)
        single = costs.pass_ms[n_nodes[0]]
        passes = [costs.pass_ms[n] / single for n in n_nodes]
        (line,) = axes.plot(n_nodes, passes, marker="o", ms=3, label=f"{depth:,} tokens before")
        if costs.draft_ms is not None:
            drafted = [x + costs.draft_ms / single for x in passes]
            axes.plot(n_nodes, drafted, color=line.get_color(), ls=":", lw=0.8)
    axes.set(xlabel="nodes of the pass (dotted: with its draft)", ylabel="time, a pass of one node = 1", ylim=(0, None))
    return bool(measured.costs)
