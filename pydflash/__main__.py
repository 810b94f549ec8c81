"""The command line: `python -m pydflash`, or `pydflash` where the package is installed.

    pydflash plan --target T.gguf --draft D.gguf --n-ctx 131072 --kv-type q4_0 --budget 22 --vram 24GiB

Exit codes: 0 done, 1 could not (a plan that does not fit, too), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from pydflash.errors import PydflashError


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; ends the program when it is wrong."""
    parser = argparse.ArgumentParser(prog="pydflash", description="Qwen3.5 with DFlash drafting.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser(
        "plan",
        allow_abbrev=False,
        help="how much memory a session will take",
        description="How much memory a session will take, row by row, from the headers of its files: nothing is "
        "loaded and no GPU is needed.",
    )
    plan.add_argument("--target", required=True, metavar="GGUF", help="the model")
    plan.add_argument("--draft", metavar="PATH", help="its DFlash drafter: a GGUF, or a folder as z-lab lays it out")
    plan.add_argument("--n-ctx", type=int, metavar="N", help="context in tokens (default: the largest that fits)")
    plan.add_argument(
        "--kv-type",
        default="auto",
        metavar="TYPE",
        help="f32, f16, q8_0 or q4_0, a pair for K and V: q8_0,q4_0, or auto (default): the first of f16, q8_0 and "
        "q4_0 that fits",
    )
    plan.add_argument("--budget", type=int, default=16, metavar="N", help="tree nodes besides the root (default: 16)")
    plan.add_argument("--n-batch", type=int, default=512, metavar="N", help="prefill chunk in tokens (default: 512)")
    plan.add_argument(
        "--n-ring", type=int, default=4096, metavar="N", help="positions the drafter sees (default: 4096)"
    )
    plan.add_argument("--vram", metavar="SIZE", help="memory to fit into, as 24GiB (default: what is free here)")
    plan.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="auto (default) is a CUDA card with --vram, else what a session would take here",
    )
    plan.add_argument("--json", action="store_true", help="print one JSON object: MiB by row, total, free, left")
    plan.set_defaults(run=run_plan)
    return parser.parse_args(arguments)


def run_plan(options: argparse.Namespace) -> int:
    """Prints a plan."""
    from pydflash.options import kv_type_of
    from pydflash.plan import plan

    made = plan(
        options.target,
        options.draft,
        n_ctx=options.n_ctx,
        kv_type=kv_type_of(options.kv_type),
        budget=options.budget,
        n_batch=options.n_batch,
        n_ring=options.n_ring,
        device=options.device,
        vram=options.vram,
    )
    print(json.dumps(made.as_dict(), indent=1) if options.json else made, flush=True)
    if not made.fits:
        print(f"error: it does not fit into {made.free:,.1f} MiB", file=sys.stderr)
    return 0 if made.fits else 1


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    options = parse_arguments(arguments)
    try:
        return int(options.run(options))
    except PydflashError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
