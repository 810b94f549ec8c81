#!/usr/bin/env python3
"""pydflash beside llama.cpp: the same files, prompts and threads, taking turns.

    pip install '.[bench]'
    python scripts/bench_peers.py --quick                 # the tiny pair: under 5 minutes on two quiet cores
    python scripts/bench_peers.py --json peers.json --markdown RESULTS.md      # about 20
    python scripts/bench_peers.py --llama-server build/bin/llama-server        # a llama.cpp of your own
    python scripts/bench_peers.py --target T.gguf --draft D/ --threads 8
    python scripts/bench_peers.py --target shapes/4b/target.gguf --draft shapes/4b/draft.gguf --costs

llama.cpp is xllamacpp's, or the llama-server that is named: plain decoding, and chain DFlash (draft-dflash) at its
own default of 3 drafted tokens a pass, at 7 and at 15, of which the fastest counts. Ours: plain decoding without a
drafter, chains and trees, and the automatic budget. Each engine is a process of its own that stands still when it is
not its turn; greedy, a fixed number of tokens, end tokens forbidden, f16 KV cache, nothing kept between runs. Speeds
are by each engine's own clock, ratios paired by prompt and round.

Every arm must say what our plain decoding says. Where one says something else, the target must not have been able to
choose there (see `pydflash bench --help`); anything else ends the command with exit code 1.

--costs is for weights that say nothing: one prompt of random tokens, the cost of a pass at several sizes, and what
comes of 6 and 8 accepted tokens a pass (ours proposes what the target said off the clock, with wrong tokens behind;
llama.cpp has --spec-synth-len, whose text is not valid). llama.cpp asks for a vocabulary: make_shape.py --vocab.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from measuring import available_memory, machine, say
from peers import sides, summary
from peers.engines import Engine, EngineError, LlamaCpp, Setup, pydflash_engine
from peers.sides import ENGINE, PEER, PLAIN, PLAIN_ENGINE, Arm, Case

import pydflash
from pydflash import models
from pydflash.bench import answers, prompts, report
from pydflash.bench.prompts import Prompt

SECTION = "peers"  # of the Markdown file
FULL: dict[str, Any] = {"prompts": 4, "rounds": 3, "n_gen": 64, "depths": [0, 1024, 8192], "prefill": [512, 2048]}
QUICK: dict[str, Any] = {"prompts": 2, "rounds": 2, "n_gen": 48, "depths": [0], "prefill": [512, 2048]}
COSTS: dict[str, Any] = {"prompts": 1, "rounds": 2, "n_gen": 256, "depths": [0], "prefill": [128]}
N_DEEP = 1  # prompts behind a document, of the first category
N_SPARE = 1024  # context for prompt and answer
DRAFTS = (3, 7, 15)  # of llama.cpp: its default, half a block, a block
CHAINS, TREES = (3, 7, 15), (4, 8, 15)  # ours; 15 drafted tokens are a pass over 16
LENGTHS = (6, 8)  # tokens accepted a pass, of --costs
N_RANDOM = 16  # tokens of its prompt
N_PASSES = 8  # of its runs


def line_up(drafted: bool, costs: bool) -> list[Arm]:
    """The arms; each of llama.cpp's is an engine of its own."""
    arms = [Arm(PEER, PEER, reads=True), Arm(PLAIN, PLAIN_ENGINE, {"budget": 0}, reads=True)]
    if not drafted:
        return arms
    arms += [Arm(f"{PEER} chain {n}", f"{PEER} chain {n}", reads=n == DRAFTS[0]) for n in DRAFTS]
    arms += [Arm(f"chain {n}", ENGINE, {"budget": n, "chain": True}, reads=n == CHAINS[0]) for n in CHAINS]
    arms += [Arm(f"tree {n}", ENGINE, {"budget": n, "chain": False}) for n in TREES]
    if not costs:
        return [*arms, Arm("auto", ENGINE, {"budget": "auto"})]
    arms += [Arm(f"{PEER} of {n}", f"{PEER} of {n}", checked=False) for n in LENGTHS]
    arms += [Arm(f"rehearsed {n}", ENGINE, {"accepted": n}) for n in LENGTHS]
    return [replace(arm, settings=arm.settings | {"n_passes": N_PASSES}) for arm in arms]


def opener(args: argparse.Namespace, target: Path, draft: Path | None, n_threads: int, logs: Path) -> Any:
    """What opens an engine by its name."""

    def open_engine(name: str) -> Engine:
        log = logs / f"{name.replace(' ', '-')}.log"
        plain = name in (PEER, PLAIN_ENGINE)
        setup = Setup(target, None if plain else draft, args.n_ctx, n_threads)
        if not name.startswith(PEER):
            return pydflash_engine(setup, log)
        size = int(name.split()[-1]) if not plain else 0
        setup = (
            Setup(target, draft, args.n_ctx, n_threads, n_draft=15, synthetic=float(size))
            if name.startswith(f"{PEER} of")
            else Setup(setup.target, setup.draft, setup.n_ctx, n_threads, n_draft=size)
        )
        return LlamaCpp(setup, log, args.llama_server)

    return open_engine


def main() -> int:
    args = arguments()
    if args.llama_server is None and importlib.util.find_spec("xllamacpp") is None:
        say("llama.cpp is missing: pip install '.[bench]', which has xllamacpp, or name a --llama-server")
        return 1
    if args.markdown:
        report.section(args.markdown, SECTION)  # refuses what could not be written, before the work
    blocks: list[report.Block] = [f"    {shlex.join(['python', 'scripts/bench_peers.py', *sys.argv[1:]])}"]
    data: list[dict[str, Any]] = []
    start = time.monotonic()
    code = 0
    with tempfile.TemporaryDirectory(prefix="pydflash-peers-") as folder:
        try:
            for target, draft in pairs(args, Path(folder)):
                for n_threads in args.threads:
                    part = one(args, target, draft, n_threads, Path(folder))
                    blocks += part["blocks"]
                    data.append(part["data"])
        except (EngineError, pydflash.PydflashError) as error:
            say(f"bench_peers: {error}")
            code = 1
        except KeyboardInterrupt:
            code = 130
    minutes = (time.monotonic() - start) / 60
    blocks.insert(1, f"{machine()}. Measured in {minutes:.1f} minutes{'' if code == 0 else ', and not to the end'}.")
    text = report.markdown(blocks)
    print(text, end="")
    if args.json:
        settings = {name: getattr(args, name) for name in FULL} | {"threads": args.threads, "machine": machine()}
        report.write_text(args.json, json.dumps({"settings": settings, "parts": data}, indent=1) + "\n")
    if args.markdown and code == 0:
        report.replace_section(args.markdown, SECTION, text)
    return code


def pairs(args: argparse.Namespace, folder: Path) -> Iterator[tuple[Path, Path | None]]:
    """The targets with their drafter, as files that both engines read."""
    targets = [args.target] if args.target else [models.target_path(), models.target_path().with_name(SMALLER)]
    draft = args.draft if args.target else models.draft_path()
    if draft is not None and draft.is_dir():
        from pydflash.convert import convert

        convert(draft, folder / "draft.gguf", target=targets[0])
        draft = folder / "draft.gguf"
    for target in targets:
        yield Path(target), draft


SMALLER = "tiny-target-q4_k_m.gguf"  # the shipped target with fewer bits


def one(args: argparse.Namespace, target: Path, draft: Path | None, n_threads: int, folder: Path) -> dict[str, Any]:
    """Everything of one target at one number of threads: {"blocks", "data"}."""
    title = f"{target.name}, {n_threads} {'threads' if n_threads > 1 else 'thread'}"
    arms = line_up(draft is not None, args.costs)
    with pydflash.Session(target, None, n_ctx=args.n_ctx, kv_type="f16", n_threads=1, device="cpu") as session:
        cases, prefills = questions(args, session)
        with progress(title) as show:
            found = sides.measure(
                opener(args, target, draft, n_threads, folder),
                arms,
                cases,
                prefills,
                n_gen=args.n_gen,
                rounds=args.rounds,
                together=fits(target, arms),
                progress=show,
            )
        sides.check(found, arms, cases, session, answers.largest_tie(session, target))
    files = " with ".join(f"{path.name} ({path.stat().st_size / 2**20:,.0f} MiB)" for path in (target, draft) if path)
    system = "; ".join(found.about[PEER]["system"]).partition("|")[2].strip()
    length = f"{N_PASSES} passes" if args.costs else f"{args.n_gen} tokens"
    how = (
        f"{files}; {len(cases)} prompts x {length} x {args.rounds} rounds, n_ctx {args.n_ctx:,}. "
        f"llama.cpp ({args.llama_server.name if args.llama_server else 'xllamacpp'}) says: {system}."
    )
    about = {"target": str(target.name), "n_threads": n_threads}
    told = summary.blocks_of_costs(found) if args.costs else summary.blocks(found, len(cases))
    return {
        "blocks": [f"### {title}", how, *told],
        "data": about | summary.as_data(found),
    }


def questions(args: argparse.Namespace, session: pydflash.Session) -> tuple[list[Case], list[Sequence[int]]]:
    """What is continued, and what is only read."""
    if args.costs:
        n_vocab = min(session.n_vocab, 200_000)
        ids = [(i * 7919 + 13) % n_vocab for i in range(max([N_RANDOM, *args.prefill]))]
        return [Case(Prompt("random", 0, ids[:N_RANDOM]), 0, ids[:N_RANDOM])], [ids[:n] for n in args.prefill]
    document = prompts.document(session, max([*args.depths, *args.prefill]))
    listed = [prompts.shipped(session, category, args.prompts) for category in args.categories]
    cases = []
    for depth in args.depths:
        wanted = listed if depth == 0 else [listed[0][:N_DEEP]]
        cases += [Case(prompt, depth, [*document[:depth], *prompt.ids]) for category in wanted for prompt in category]
    return cases, [document[:n] for n in args.prefill]


def fits(target: Path, arms: Sequence[Arm]) -> bool:
    """Whether all engines can be open at once: llama.cpp repacks weights, at most all of them, for itself."""
    n_peers = len({arm.engine for arm in arms if arm.engine.startswith(PEER)})
    return n_peers * target.stat().st_size < available_memory() / 2


@contextmanager
def progress(title: str) -> Iterator[Any]:
    """One line on stderr that is written over."""
    start = time.monotonic()

    def show(what: str) -> None:
        print(f"\r{f'{title}: {what}, {time.monotonic() - start:.0f} s':<100}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        print(file=sys.stderr)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.epilog = (__doc__ or "").partition("\n\n")[2]
    parser.add_argument("--quick", action="store_true", help="fewer prompts, rounds and no depth, where none are given")
    parser.add_argument("--costs", action="store_true", help="the cost of a pass, for weights that say nothing")
    parser.add_argument("--target", type=Path, help="GGUF (default: the tiny pair's two)")
    parser.add_argument("--draft", type=Path, help="its drafter, a GGUF or a folder")
    parser.add_argument("--llama-server", type=Path, metavar="FILE", help="instead of xllamacpp")
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", help="default: all cores, and 1")
    parser.add_argument("--categories", nargs="+", choices=prompts.CATEGORIES, default=prompts.CATEGORIES)
    parser.add_argument("--depths", type=int, nargs="+", metavar="N", help="tokens before the prompt")
    parser.add_argument("--prefill", type=int, nargs="*", metavar="N", help="tokens that are only read")
    parser.add_argument("--prompts", type=int, metavar="N", help="of each category")
    parser.add_argument("--n-gen", type=int, metavar="N", help="tokens from each prompt")
    parser.add_argument("--rounds", type=int, metavar="N")
    parser.add_argument("--n-ctx", type=int, metavar="N", help="default: the largest depth, and room")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything, each run included")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help=f"the report, into its section <!-- {SECTION} -->"
    )
    args = parser.parse_args()
    for name, default in (COSTS if args.costs else QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    cores = len(os.sched_getaffinity(0))
    args.threads = args.threads or sorted({cores, 1}, reverse=True)
    args.n_ctx = args.n_ctx or max([*args.depths, *args.prefill]) + N_SPARE
    if args.draft and not args.target:
        parser.error("--draft needs its --target")
    for name in ("prompts", "rounds", "n_gen"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for path in (args.target, args.draft, args.llama_server):
        if path and not path.exists():
            parser.error(f"there is no {path}")
    return args


if __name__ == "__main__":
    sys.exit(main())
