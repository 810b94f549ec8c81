"""How much memory a session will take, row by row, from the headers of its files: nothing is loaded and no GPU is
needed.

    pydflash plan --target T.gguf --draft D.gguf --n-ctx 131072 --kv-type q4_0 --budget 22 --vram 24GiB

A plan that does not fit ends with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import sys

from pydflash.cli import common

HELP = "how much memory a session will take"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    common.add_models(parser, required=True)
    common.add_session(parser, runs=False)
    parser.add_argument("--budget", type=int, metavar="N", help="tree nodes besides the root (default: 16)")
    parser.add_argument(
        "--vram", metavar="SIZE", help="memory to fit into, as 24GiB; --device auto then is a CUDA card (default: what "
        "is free here)"
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object: MiB by row, total, free, left")


def run(options: argparse.Namespace) -> int:
    """Prints a plan."""
    from pydflash.plan import plan

    target, draft = common.find_models(options.target, options.draft)
    settings = ("n_ctx", "kv_type", "budget", "n_batch", "n_ring", "device", "vram")
    made = plan(target, draft, **common.given(options, settings))
    print(json.dumps(made.as_dict(), indent=1) if options.json else made, flush=True)
    if not made.fits:
        print(f"error: it does not fit into {made.free:,.1f} MiB", file=sys.stderr)
    return 0 if made.fits else 1
