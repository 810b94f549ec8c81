#!/usr/bin/env python3
"""Measure long contexts on the CPU: exactness, memory, time against depth, KV types, the drafter's ring.

    python scripts/long_context.py equal     # 100,000 tokens: tree = plain at 1K, 8K, 32K, 100K; memory
    python scripts/long_context.py speed     # time per token against depth: CSV and plot
    python scripts/long_context.py kv        # logit error and accepted length of the KV types
    python scripts/long_context.py ring      # the drafter's ring against float64 and against an unlimited one
    python scripts/long_context.py all       # all of them; each says how long it took
    python scripts/long_context.py plot      # the plot again, from results/long_speed.csv

The pair that ships with pydflash runs unless --target names another; where its context length is below --n-ctx, or
another --rope-theta is asked for, it is a changed copy. Long documents are the standard library's sources, prompts for
acceptance the files that the shipped pair was not trained on. Each part writes results/long_<part>.csv and .md; --quick
is a minute of small depths, to try it. Results belong to a quiet machine.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from long_caches import kv, measure_kv, ring
from measuring import (
    BUDGET,
    DRAFTED,
    Progress,
    Timeline,
    allocated_mib,
    anonymous_mib,
    document,
    machine,
    parted,
    say,
    table,
    timed,
    write_csv,
)

import pydflash
from pydflash import models
from pydflash._handles import draft_file
from tests.tiny_models import copy_gguf


@dataclass(frozen=True)
class Plan:
    """How much each part does."""

    depths: list[int]  # tree = plain
    speed_depths: list[int]
    speed_steps: int  # of each kind at each depth
    kv_depths: list[int]
    kv_prompts: int
    kv_prompt_length: int
    rings: list[tuple[int, Sequence[int], int]]  # n_ring, tokens of the prompts of a document, documents
    ring_depths: list[int]  # exactness of the ring of the last n_ring
    n_gen: int


FULL = Plan(
    depths=[1_000, 8_000, 32_000, 100_000],
    speed_depths=[1_000, 2_000, 4_000, 6_000, *range(8_000, 100_001, 4_000)],
    speed_steps=12,
    kv_depths=[1_000, 8_000],
    kv_prompts=40,
    kv_prompt_length=1_000,
    rings=[(512, [1_000], 200), (4096, range(4_352, 8_193, 256), 14)],
    ring_depths=[4_095, 4_096, 4_097, 8_192, 10_000],
    n_gen=64,
)
QUICK = Plan(
    depths=[300, 1_200],
    speed_depths=[300, 600, 900],
    speed_steps=2,
    kv_depths=[600],
    kv_prompts=2,
    kv_prompt_length=300,
    rings=[(256, [450, 600], 2)],
    ring_depths=[255, 257, 700],
    n_gen=16,
)


class Bench:
    """The pair, as it is or changed so that the context is legal, and the options that every part shares."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        self.a = arguments
        self.plan = QUICK if arguments.quick else FULL
        self._scratch = scratch
        self.target = Path(arguments.target or models.target_path())
        draft = arguments.draft or (None if arguments.target else models.draft_path())
        if draft is None:
            raise pydflash.ArgumentError("--target needs --draft: half of what is measured here is drafting")
        self.draft = draft_file(draft)

    def legal_target(self, *, f32: bool) -> Path:
        """The target with room for n_ctx tokens, its weights as they are or as F32."""
        keys = {name: entry.contents() for name, entry in gguf.GGUFReader(self.target).fields.items()}
        changed: dict[str, Any] = {}
        if keys["qwen35.context_length"] < self.a.n_ctx:
            changed["qwen35.context_length"] = self.a.n_ctx
        if self.a.rope_theta:
            changed["qwen35.rope.freq_base"] = self.a.rope_theta
        if not changed and not f32:
            return self.target
        path = self._scratch / f"target-{'f32' if f32 else 'as-is'}.gguf"
        return path if path.exists() else copy_gguf(self.target, path, f32=f32, keys=changed)

    def f32_draft(self) -> Path:
        """The drafter with F32 weights: with BF16 ones the CPU rounds what it multiplies them with, too."""
        path = self._scratch / "draft-f32.gguf"
        return path if path.exists() else copy_gguf(self.draft, path, f32=True)

    def session(self, kv_type: str, *, f32: bool = False, **options: Any) -> pydflash.Session:
        given = {"n_ctx": self.a.n_ctx, "n_batch": self.a.n_batch, "n_threads": self.a.n_threads, **options}
        draft = self.f32_draft() if f32 else self.draft
        return pydflash.Session(self.legal_target(f32=f32), draft, kv_type=kv_type, **given)

    def depths(self, wanted: list[int], room: int) -> list[int]:
        """The depths that the context has room for, down to the deepest that is asked for."""
        most = min(self.a.n_ctx - room, self.a.deepest or self.a.n_ctx)
        return [depth for depth in wanted if depth <= most]

    def write(self, part: str, rows: list[dict[str, Any]], markdown: str) -> None:
        write_csv(self.a.out / f"long_{part}.csv", rows)
        text = f"    {self.command(part)}\n\n{markdown}\n\n{machine()}.\n"
        (self.a.out / f"long_{part}.md").write_text(text)
        print(text)

    def command(self, part: str) -> str:
        """What makes this part's figures again."""
        flags = ("quick",) if self.a.quick else ()
        valued = ("target", "draft", "n_ctx", "rope_theta", "n_batch", "n_threads", "deepest", "kv_types", "unrotated")
        words = [f"python scripts/long_context.py {part}", *(f"--{flag}" for flag in flags)]
        for name in valued:
            value = getattr(self.a, name)
            if value != self.a.defaults[name]:
                values = value if isinstance(value, list) else [value]
                words += [f"--{name.replace('_', '-')}", *map(str, values)]
        return " ".join(words)


# ---- tree = plain, memory ----------------------------------------------------------------------------------------


def equal(bench: Bench) -> None:
    """Tree against plain and the memory, depth by depth; interrupted, it writes what it has."""
    rows: list[dict[str, Any]] = []
    try:
        for kv_type in bench.a.kv_types or ["f32", "f16", "q8_0", "q4_0"]:
            with timed(f"equal, {kv_type}"):
                rows.extend(equal_rows(bench, kv_type))
    finally:
        if rows:
            bench.write("equal", rows, equal_markdown(rows))


def equal_rows(bench: Bench, kv_type: str) -> Iterator[dict[str, Any]]:
    """One timeline through a long document; at each depth decodes plainly, goes back and decodes with a tree. Samples
    the anonymous memory all the while."""
    n_gen = bench.plan.n_gen
    f32 = kv_type == "f32"  # exact to the token only when weights and cache are
    depths = bench.depths(bench.plan.depths, n_gen)
    with bench.session(kv_type, f32=f32) as session:
        opened = {"memory_opened_mib": round(anonymous_mib(), 1), "allocated_opened_mib": round(allocated_mib(), 1)}
        text = document(session, max(depths))
        timeline = Timeline(session)
        progress = Progress(f"equal, {kv_type}", max(depths))
        for depth in depths:
            memory: list[float] = []  # MiB allocated, after each slice since the depth before
            timeline.append(text[timeline.n_tokens : depth], sampled(progress, memory))
            here = timeline.mark()
            plain = timeline.decode(n_gen, budget=0)
            timeline.back_to(here)
            tree = timeline.decode(n_gen, **DRAFTED)
            timeline.back_to(here)
            memory.append(allocated_mib())
            at = parted(plain.ids, tree.ids)
            row: dict[str, Any] = {"kv_type": kv_type, "weights": "F32" if f32 else "as shipped", "depth": depth}
            row |= {"tree_per_pass": round(tree.per_pass, 3), "tokens": n_gen, "same": n_gen if at is None else at}
            row["margin"] = ""
            if at is not None:
                timeline.decode(at, budget=0)
                row["margin"] = round(timeline.margin(plain.ids[at], tree.ids[at]), 5)
                timeline.back_to(here)
            # Graphs are made as their shapes appear, up to a number of them: flat means, since the depth before.
            row |= {**opened, "memory_mib": round(anonymous_mib(), 1), "allocated_mib": round(memory[-1], 1)}
            row["growth_mib"] = round(max(memory) - memory[0], 1)
            yield row


def sampled(progress: Progress, memory: list[float]) -> Callable[[int, float], None]:
    """What a prefill calls after each slice: shows the progress and notes the memory."""

    def after(n: int, seconds: float) -> None:
        progress(n, seconds)
        memory.append(allocated_mib())

    return after


def equal_markdown(rows: list[dict[str, Any]]) -> str:
    header = ["KV cache", "depth", "same tokens", "margin where they part", "tokens per pass", "MiB touched"]
    body = [
        (r["kv_type"], f"{r['depth']:,}", f"{r['same']} of {r['tokens']}", r["margin"] or "-",
         f"{r['tree_per_pass']:.2f}", f"{r['memory_mib']:.0f}")
        for r in rows
    ]  # fmt: skip
    memory = [
        f"{r['kv_type']}: {r['allocated_opened_mib']:.0f} MiB were allocated after opening, {r['allocated_mib']:.0f} "
        f"at the end, {r['growth_mib']:.1f} of them on the way to the last depth; touched were "
        f"{r['memory_opened_mib']:.0f} after opening and {r['memory_mib']:.0f} at the end: deeper rows come into use."
        for r in rows
        if r["depth"] == max(other["depth"] for other in rows if other["kv_type"] == r["kv_type"])
    ]
    return "\n\n".join([table(header, body), *memory])


# ---- time against depth ------------------------------------------------------------------------------------------


def speed(bench: Bench) -> None:
    """One timeline to the greatest depth; at each depth on the way some plain steps and some tree steps."""
    plan, rows = bench.plan, []
    for kv_type in bench.a.kv_types or ["f16", "q4_0"]:
        depths = bench.depths(plan.speed_depths, 2 * plan.speed_steps * len(plan.speed_depths))
        with bench.session(kv_type) as session, timed(f"speed, {kv_type}"):
            text = document(session, max(depths))
            timeline = Timeline(session)
            progress = Progress(f"speed, {kv_type}", max(depths))
            for depth in depths:
                piece = text[timeline.n_tokens : depth]
                seconds = timeline.append(piece, progress)
                plain = timeline.decode(plan.speed_steps, budget=0)
                tree = timeline.decode(plan.speed_steps, **DRAFTED)
                rows.append(
                    {
                        "kv_type": kv_type,
                        "depth": depth,
                        "prefill_tps": round(len(piece) / seconds, 1),
                        "plain_ms_per_token": round(float(np.median(plain.seconds)) * 1e3, 3),
                        "tree_ms_per_pass": round(float(np.median(tree.seconds)) * 1e3, 3),
                        "tokens_per_pass": round(tree.per_pass, 3),
                        **{f"tree_{part}_ms": round(float(np.median(ms)), 3) for part, ms in tree.ms.items()},
                    }
                )
    header = ["KV cache", "depth", "prefill tokens/s", "plain ms/token", f"ms/pass of a tree of {BUDGET}"]
    shown = [
        r for r in rows if r["depth"] in {*plan.depths, *plan.speed_depths[:: max(1, len(plan.speed_depths) // 6)]}
    ]
    body = [
        (r["kv_type"], f"{r['depth']:,}", f"{r['prefill_tps']:.0f}", f"{r['plain_ms_per_token']:.2f}",
         f"{r['tree_ms_per_pass']:.1f}")
        for r in shown
    ]  # fmt: skip
    bench.write("speed", rows, table(header, body) + "\n\n![time against depth](results/long_speed.svg)")
    plot(bench)


def plot(bench: Bench) -> None:
    """long_speed.csv as an SVG."""
    try:
        import matplotlib as mpl

        mpl.use("svg")
        import matplotlib.pyplot as plt
    except ImportError:
        say("no plot: matplotlib is not installed (pip install 'pydflash[bench]'); the CSV holds the figures")
        return
    with (bench.a.out / "long_speed.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "pydflash", "font.size": 9}  # text as text, same bytes
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), constrained_layout=True)
    panels = (("plain_ms_per_token", "plain, ms a token"), ("tree_ms_per_pass", f"tree of {BUDGET}, ms a pass"))
    for axis, (column, title) in zip(axes, panels, strict=True):
        for kv_type in dict.fromkeys(row["kv_type"] for row in rows):
            points = [(int(row["depth"]) / 1000, float(row[column])) for row in rows if row["kv_type"] == kv_type]
            axis.plot(*zip(*points, strict=True), marker=".", markersize=3, linewidth=1, label=f"{kv_type} cache")
        axis.set(title=title, xlabel="thousand tokens of context", xlim=0, ylim=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(bench.a.out / "long_speed.svg", metadata={"Date": None})
    plt.close(figure)


# ---- command line ------------------------------------------------------------------------------------------------

COMMANDS: dict[str, Sequence[Callable[[Bench], None]]] = {
    "equal": [equal],
    "speed": [speed],
    "kv": [kv],
    "ring": [ring],
    "all": [equal, speed, kv, ring],
    "plot": [plot],
}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    about, _, details = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(
        description=about, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("part", choices=COMMANDS)
    p.add_argument("--target", metavar="GGUF", help="default: the pair that ships with pydflash")
    p.add_argument("--draft", metavar="PATH")
    p.add_argument("--n-ctx", type=int, default=131_072, metavar="N", help="default: 131072")
    p.add_argument("--rope-theta", type=float, metavar="X", help="default: the target's own")
    p.add_argument("--n-batch", type=int, default=512, metavar="N", help="tokens a prefill pass takes (default: 512)")
    p.add_argument("--n-threads", type=int, metavar="N", help="default: one a core; 1 on a machine that is busy")
    p.add_argument("--deepest", type=int, metavar="N", help="of equal and speed (default: 100000)")
    p.add_argument(
        "--kv-types", nargs="+", metavar="TYPE", help="of equal (default: f32 f16 q8_0 q4_0), speed (f16 q4_0)"
    )
    p.add_argument(
        "--unrotated",
        metavar="FOLDER",
        help="a build folder made with CXXFLAGS=-DPF_ROTATE_KV=0, for kv's row of q4_0 without rotation",
    )
    p.add_argument("--measure-only", nargs=2, metavar=("TYPE", "FILE"), help=argparse.SUPPRESS)
    p.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    p.add_argument("--quick", action="store_true", help="small depths, few prompts")
    parsed = p.parse_args(arguments)
    parsed.defaults = {action.dest: action.default for action in p._actions}
    return parsed


def main(arguments: list[str] | None = None) -> int:
    a = parse_arguments(arguments)
    try:
        with scratch_folder() as scratch:
            bench = Bench(a, scratch)
            if a.measure_only:
                kv_type, file = a.measure_only
                np.savez(file, **measure_kv(bench, kv_type))
                return 0
            for part in COMMANDS[a.part]:
                part(bench)
    except pydflash.PydflashError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2 if isinstance(problem, pydflash.ArgumentError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for changed copies of the models, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="pydflash-long-") as folder:
        yield Path(folder)


if __name__ == "__main__":
    sys.exit(main())
