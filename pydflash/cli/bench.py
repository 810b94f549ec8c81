"""Speed and accepted tokens of plain decoding, a chain and trees of several budgets, on prompts that ship.

    pydflash bench
    pydflash bench --target model.gguf --draft drafter/ --budgets 8 22 --json

Greedy, a fixed number of tokens from each prompt; end tokens do not end them. The ways take turns on every prompt, in
every round, so that a noisy machine is noisy for all. The output's hash is the same for all of them, but for quantised
caches or weights, where two tokens the model likes equally well may change places: "as plain" counts the prompts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydflash.cli import common, terminal

if TYPE_CHECKING:
    import pydflash

HELP = "measure speed and accepted tokens"

PROMPTS = Path(__file__).with_name("prompts.json")
N_CTX = 2048  # by default: the prompts are short


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    common.add_models(parser)
    common.add_session(parser, n_ctx=str(N_CTX))
    group = parser.add_argument_group("measuring")
    group.add_argument(
        "--budgets", type=int, nargs="+", default=[8, 16, 32], metavar="N", help="of the trees (default: 8 16 32)"
    )
    group.add_argument("--n-gen", "-n", type=int, default=32, metavar="N", help="tokens from each prompt (default: 32)")
    group.add_argument("--prompts", type=int, default=8, metavar="N", help="prompts, at most 16 (default: 8)")
    group.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    group.add_argument("--json", action="store_true", help="print one JSON object")


@dataclass
class Way:
    """A way of decoding, and what came of it: rounds[r] holds the results of round r, one a prompt."""

    name: str
    settings: dict[str, Any]
    rounds: list[list[pydflash.Result]] = field(default_factory=list)


def run(options: argparse.Namespace) -> int:
    """Measures and prints a table."""
    import pydflash

    for name in ("n_gen", "prompts", "rounds"):
        if getattr(options, name) < 1:
            options.usage_error(f"--{name.replace('_', '-')} must be at least 1")
    prompts = chosen(options.prompts)
    options.n_ctx = options.n_ctx or N_CTX
    with common.open_session(options, budget=max(options.budgets)) as session:
        ways = [Way("plain", {"budget": 0})]
        if session.block_size:
            ways.append(Way("chain", {"budget": session.block_size - 1, "chain": True}))
            ways += [Way(f"tree of {n}", {"budget": n, "chain": False}) for n in options.budgets]
        measure(session, ways, prompts, options)
        where = pydflash.device_info(session.device).name
    figures = {way.name: summary(way, ways[0]) for way in ways}
    if options.json:
        settings = {"device": where, "n_prompts": len(prompts), "n_gen": options.n_gen, "rounds": options.rounds}
        print(json.dumps(settings | {"ways": figures}, indent=1))
        return 0
    plain = figures["plain"]["tokens_per_second"]
    terminal.table(
        ["", "tokens/s", "of plain", "tokens a pass", "output", "as plain"],
        [
            [
                name,
                f"{f['tokens_per_second']:.1f}",
                f"{f['tokens_per_second'] / plain:.2f}",
                f"{f['tokens_per_pass']:.2f}",
                f["output_hash"],
                f"{f['n_as_plain']} of {len(prompts)}",
            ]
            for name, f in figures.items()
        ],
        right=(1, 2, 3),
    )
    print(terminal.one_line(f"{len(prompts)} prompts x {options.n_gen} tokens, median of {options.rounds}; {where}"))
    return 0


def chosen(n: int) -> list[str]:
    """So many of the prompts that ship, spread evenly over their categories."""
    texts: list[str] = [prompt["text"] for prompt in json.loads(PROMPTS.read_text(encoding="utf-8"))["prompts"]]
    n = min(n, len(texts))
    return [texts[i * len(texts) // n] for i in range(n)]


def measure(session: pydflash.Session, ways: list[Way], prompts: list[str], options: argparse.Namespace) -> None:
    """Fills in the ways' rounds. The first run of all is thrown away: it warms up what the others find warm."""
    settings: dict[str, Any] = {"max_tokens": options.n_gen, "ignore_eos": True, "temperature": 0}
    session.generate(prompts[0], **settings)
    total = options.rounds * len(prompts) * len(ways)
    n_done = 0
    with terminal.progress("measuring", "runs") as show:
        for _ in range(options.rounds):
            for way in ways:
                way.rounds.append([])
            for prompt in prompts:
                for way in ways:
                    way.rounds[-1].append(session.generate(prompt, **settings, **way.settings))
                    n_done += 1
                    show(n_done, total)


def summary(way: Way, plain: Way) -> dict[str, Any]:
    """The figures of a way. tokens_per_second: of decoding alone, the median over the rounds."""
    from pydflash.results import output_hash

    speeds = []
    for results in way.rounds:
        seconds = sum(r.stats.n_generated / r.stats.decode_tps for r in results)
        speeds.append(sum(r.stats.n_generated for r in results) / seconds)
    results = way.rounds[0]
    ids = [token for result in results for token in result.ids]
    return {
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_pass": len(ids) / sum(result.stats.n_steps for result in results),
        "output_hash": output_hash(ids),
        "n_as_plain": sum(a.ids == b.ids for a, b in zip(results, plain.rounds[0], strict=True)),
    }
