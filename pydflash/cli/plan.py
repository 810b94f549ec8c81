"""How much memory a session will take, row by row, from the headers of its files: nothing is loaded and no GPU is
needed. With --speed: how fast it could be on a card.

    pydflash plan --target T.gguf --draft D.gguf --n-ctx 131072 --kv-type q4_0 --budget 22 --vram 24GiB
    pydflash plan --target T.gguf --draft D.gguf --speed --gpu 3090 --accepted 6.5

A speed is a prediction from sizes: a step takes no less than the bytes it must move over the bandwidth of the card's
memory, and its arithmetic where that takes longer. A plan that does not fit ends with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from pydflash.cli import common

if TYPE_CHECKING:
    from pydflash.plan import Plan

HELP = "how much memory a session will take, and how fast it could be"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    common.add_models(parser, required=True)
    common.add_session(parser, runs=False)
    parser.add_argument("--budget", type=common.budget, metavar="N", help=common.BUDGET_HELP)
    parser.add_argument(
        "--vram", metavar="SIZE", help="memory to fit into, as 24GiB; --device auto then is a CUDA card (default: that "
        "of --gpu, or what is free here)"
    )  # fmt: skip
    parser.add_argument("--gpu", metavar="NAME", help="a card to plan for, as 3090 or A6000")
    parser.add_argument("--json", action="store_true", help="print one JSON object: MiB by row, total, free, left")
    group = parser.add_argument_group("predicted speed")
    group.add_argument(
        "--speed", action="store_true", help="predict step times and tokens/s at depths up to --n-ctx (default: "
        "131072, or what the model can), at several budgets or that of --budget"
    )  # fmt: skip
    group.add_argument("--bandwidth", type=float, metavar="GB/s", help="of the memory (default: that of --gpu)")
    group.add_argument(
        "--accepted", metavar="N|FILE", help="tokens a step gives, or what 'pydflash bench --json' has printed "
        "(default: those of the small pair that ships)"
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Prints a plan, or a speed."""
    from pydflash import cards
    from pydflash.plan import plan

    card = cards.find_card(options.gpu) if options.gpu else None
    if options.speed:
        if not card and not (options.bandwidth and options.vram):
            options.usage_error("--speed goes with --gpu, or with --bandwidth and --vram")
    elif options.bandwidth or options.accepted:
        options.usage_error("--bandwidth and --accepted go with --speed")
    target, draft = common.find_models(options.target, options.draft)
    settings = common.given(options, ("n_ctx", "kv_type", "budget", "n_batch", "n_ring", "device", "vram"))
    if card:
        settings.setdefault("vram", cards.CARDS[card].n_bytes)
    if not options.speed:
        return show(options, plan(target, draft, **settings))

    from pydflash import speed

    accepted = speed.read_acceptance(options.accepted) if options.accepted else speed.SHIPPED
    pair = speed.read_pair(target, draft)
    settings.setdefault("n_ctx", min(speed.DEPTHS[-1], pair.n_ctx))
    made = plan(target, draft, **{"budget": speed.MOST_NODES} | settings)
    if not made.fits:
        return show(options, made)
    ways = speed.WAYS if options.budget is None else sorted({(0, False), (options.budget, False)})
    found = speed.predict(pair, made, card=card, bandwidth=options.bandwidth, accepted=accepted, ways=ways)
    print(json.dumps(found.as_dict(), indent=1) if options.json else found)
    return 0


def show(options: argparse.Namespace, made: Plan) -> int:
    """Prints a plan and returns the exit code."""
    print(json.dumps(made.as_dict(), indent=1) if options.json else made, flush=True)
    if not made.fits:
        print(f"error: it does not fit into {made.free:,.1f} MiB", file=sys.stderr)
    return 0 if made.fits else 1
