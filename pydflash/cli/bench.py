"""Measure plain decoding, a chain, trees of several budgets and the automatic budget beside each other.

    pydflash bench                                        # the tiny pair: about 2 minutes on two quiet cores
    pydflash bench --quick                                # half a minute
    pydflash bench --target model.gguf --draft drafter/ --categories code chat --depths 0 8K
    pydflash bench --dataset humaneval --prompts 20       # from the hub; --dataset humaneval=FILE without one
    pydflash bench --json out.json --csv out.csv --markdown RESULTS.md --plots plots/

Every prompt is continued by a fixed number of tokens, behind end tokens too, by every way of decoding in turn, several
rounds of it. Ratios are paired by prompt and round. All categories are run greedily with nothing before the prompt, the
first one also with --temperature, and two prompts of it behind a document at the depths asked for.

All ways must say what plain decoding says. Where one says something else, the model must not have been able to
choose: with F32 weights and caches at most 0.002 logits may lie between the two tokens, with other caches 0.05, with
weights in F16 or BF16 0.03, in Q8_0 0.15, in fewer bits 0.5. Anything else ends the command with exit code 1. Ctrl-C
ends it with 130, and what was measured by then is shown and written all the same.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydflash.cli import common, terminal

if TYPE_CHECKING:
    import pydflash
    from pydflash.bench.measure import Measured, Part

HELP = "measure speed and accepted tokens"

FULL: dict[str, Any] = {"prompts": 6, "rounds": 7, "n_gen": 48, "depths": [0, 1024, 8192, 32768]}
QUICK: dict[str, Any] = {"prompts": 2, "rounds": 2, "n_gen": 48, "depths": [0, 1024]}
N_DEEP = 2  # prompts that are run behind a document
N_SPARE = 1024  # context for prompt and answer
SECTION = "bench"  # of the Markdown file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    from pydflash.bench.prompts import CATEGORIES, DATASETS

    common.add_models(parser)
    common.add_session(parser, n_ctx="the largest depth, and room for prompt and answer")
    group = parser.add_argument_group("what is measured")
    group.add_argument("--quick", action="store_true", help="fewer prompts, rounds and depths, where none are given")
    group.add_argument(
        "--categories", nargs="+", choices=CATEGORIES, metavar="NAME", help=f"of {', '.join(CATEGORIES)} (default: all)"
    )
    group.add_argument(
        "--dataset",
        nargs="+",
        metavar="NAME[=FILE]",
        help=f"instead of the categories, or besides those that are named: {', '.join(DATASETS)}, by the package "
        "'datasets' from the hub, or its rows as lines of JSON",
    )
    group.add_argument("--prompts", type=int, metavar="N", help="of each category (default: 6, which is all of them)")
    group.add_argument(
        "--arms",
        nargs="*",
        choices=ARMS,
        default=ARMS,
        metavar="NAME",
        help="of chain, tree and auto (default: all)",
    )
    group.add_argument(
        "--budgets", type=int, nargs="+", default=[8, 16, 32], metavar="N", help="of the trees (default: 8 16 32)"
    )
    group.add_argument(
        "--depths", type=depth, nargs="+", metavar="N", help="tokens before the prompt (default: 0 1K 8K 32K)"
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=0.7,
        metavar="T",
        help="of the sampled part (default: 0.7; 0: leave it out)",
    )
    group.add_argument("--n-gen", "-n", type=int, metavar="N", help="tokens from each prompt (default: 48)")
    group.add_argument("--rounds", type=int, metavar="N", help="default: 7")
    group = parser.add_argument_group("what is written")
    group.add_argument("--json", type=Path, metavar="FILE", help="everything, each run included")
    group.add_argument("--csv", type=Path, metavar="FILE", help="the figures, a line for each way in each setting")
    group.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help=f"the report, between <!-- {SECTION} begin --> and <!-- {SECTION} end --> of this file, or at its end",
    )
    group.add_argument("--plots", type=Path, metavar="DIR", help="SVG, by matplotlib")


ARMS = ["chain", "tree", "auto"]


def depth(text: str) -> int:
    """A number of tokens: 8192 or 8K."""
    return int(text[:-1]) * 1024 if text[-1:] in ("k", "K") else int(text)


depth.__name__ = "N"  # argparse names the type in its refusal


def run(options: argparse.Namespace) -> int:
    """Measures, prints the report, writes the files."""
    from pydflash import models
    from pydflash.bench import answers, floor, measure, report

    for name, default in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    check(options)
    for path in filter(None, (options.json, options.csv, options.markdown)):
        report.check_writable(path)
    if options.markdown:
        report.section(options.markdown, SECTION)  # refuses what it could not change
    if options.plots:
        from pydflash.bench import plots

        plots.load()
    options.n_ctx = options.n_ctx or max(options.depths) + N_SPARE
    measured = measure.Measured()
    with common.open_session(options, budget=max(options.budgets)) as session:
        about = describe(session, options)
        target = common.find_models(options.target, None)[0] if options.target else models.target_path()
        tie = answers.largest_tie(session, target)
        code = 0
        try:
            measured.floor = floor.measure(session, target, n_threads(options))
            with terminal.progress("measuring", "runs") as show:
                measure.measure(
                    session,
                    measure.arms(session, options.arms, options.budgets),
                    parts(session, options),
                    n_gen=options.n_gen,
                    rounds=options.rounds,
                    tie=tie,
                    out=measured,
                    progress=show,
                )
        except KeyboardInterrupt:
            about.append("Interrupted: what follows is of the runs made by then.")
            code = 130
    write(measured, about, options)
    return code


def check(options: argparse.Namespace) -> None:
    """Ends the program when a number cannot be meant."""
    for name in ("prompts", "rounds", "n_gen"):
        if getattr(options, name) < 1:
            options.usage_error(f"--{name.replace('_', '-')} must be at least 1")
    if min(options.depths) < 0:
        options.usage_error("--depths must not be negative")


def parts(session: pydflash.Session, options: argparse.Namespace) -> list[Part]:
    """What is measured, in order."""
    from pydflash.bench import prompts
    from pydflash.bench.measure import parts

    categories = options.categories or ([] if options.dataset else prompts.CATEGORIES)
    found = [prompts.shipped(session, category, options.prompts) for category in categories]
    found += [prompts.from_dataset(session, name, options.prompts) for name in options.dataset or ()]
    return parts(found, options.depths, options.temperature, n_deep=N_DEEP)


def n_threads(options: argparse.Namespace) -> int:
    """Threads of the CPU that the session uses."""
    import os

    return int(options.n_threads or len(os.sched_getaffinity(0)))


def describe(session: pydflash.Session, options: argparse.Namespace) -> list[str]:
    """Paragraphs on what is measured, where and how."""
    import pydflash

    device = pydflash.device_info(session.device).name
    threads = n_threads(options)
    where = device if session.device != "cpu" else f"{device}, {threads} {'threads' if threads > 1 else 'thread'}"
    pair = (
        "the shipped pair" if options.target is None else " with ".join(filter(None, (options.target, options.draft)))
    )
    return [
        f"    {shlex.join(['pydflash', *sys.argv[1:]])}",
        f"{pair}, KV cache {' and '.join(dict.fromkeys(session.plan.kv_type))}, pydflash "
        f"{pydflash.__version__}, {where}. {options.n_gen} tokens from each of {options.prompts} prompts a category, "
        f"{options.rounds} rounds in which all ways take turns.",
    ]


def write(measured: Measured, about: list[str], options: argparse.Namespace) -> None:
    """The report on stdout, and the files that were asked for."""
    import os

    from pydflash.bench import plots, report, summary

    blocks = summary.blocks(measured, about)
    for i, block in enumerate(blocks):
        print(end="\n" if i else "")
        if isinstance(block, report.Table):
            terminal.table(block.heads, block.rows, right=range(1, len(block.heads)))
        else:
            print(terminal.visible(block))
    if options.json:
        settings = {name: getattr(options, name) for name in (*FULL, "budgets", "temperature", "target", "draft")}
        report.write_text(
            options.json, json.dumps(summary.as_data(measured, settings | {"about": about}), indent=1) + "\n"
        )
    if options.csv:
        report.write_csv(options.csv, summary.as_rows(measured.runs))
    drawn = plots.draw(measured, options.plots) if options.plots else []
    if options.markdown:
        folder = options.markdown.resolve().parent
        images = [f"![{path.stem}]({Path(os.path.relpath(path.resolve(), folder)).as_posix()})" for path in drawn]
        report.replace_section(options.markdown, SECTION, report.markdown([*blocks, *images]))
