#!/usr/bin/env python3
"""Continue a prompt with a pydflash model: text to stdout as it comes, one line of figures to stderr.

    python scripts/run.py --prompt "def fibonacci(n):"
    python scripts/run.py -f notes.txt --target model.gguf --draft drafter/ --temperature 0.7 --seed 1
    git diff | python scripts/run.py --json

Without --target the tiny pair runs that ships with pydflash. Prompts are continued as they stand; no chat template is
applied. Exit codes: 0 done, 1 could not, 2 wrong usage, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType

import pydflash
from pydflash import models
from pydflash.options import kv_type_of


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    about, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", "-p", metavar="TEXT", help="the prompt; '-' reads stdin, as does a pipe without it")
    source.add_argument("-f", "--file", metavar="FILE", help="read the prompt from a file, '-' for stdin")
    parser.add_argument("--n-gen", "-n", type=int, default=128, metavar="N", help="at most N tokens (default: 128)")
    parser.add_argument("--target", metavar="GGUF", help="the model (default: the tiny one that ships with pydflash)")
    parser.add_argument("--draft", metavar="PATH", help="its DFlash drafter: a GGUF, or a folder as z-lab lays it out")
    parser.add_argument("--budget", type=int, metavar="N", help="tree nodes besides the root, 0 to 63 (default: 16)")
    parser.add_argument("--chain", action="store_true", help="draft one line of tokens instead of a tree")
    parser.add_argument("--no-draft", action="store_true", help="decode plainly; the drafter is not opened")
    parser.add_argument(
        "--kv-type",
        default="auto",
        metavar="TYPE",
        help="f32, f16, q8_0 or q4_0, a pair for K and V: q8_0,q4_0, or auto (default): the first of f16, q8_0 and "
        "q4_0 that fits",
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto (default), cpu or cuda")
    parser.add_argument("--n-ctx", type=int, metavar="N", help="context in tokens (default: the largest that fits)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the likeliest token"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest (default 0: all)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest share P (default: 1)"
    )
    parser.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="leave out what is below P times the likeliest"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="of the draws (default: a random one, reported)")
    parser.add_argument("--raw", action="store_true", help="no chat template: what this version does in any case")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")
    options = parser.parse_args(arguments)
    if options.no_draft and (options.draft or options.chain or options.budget):
        parser.error("--no-draft goes without --draft, --chain and --budget")
    if options.prompt is None and options.file is None and sys.stdin.isatty():
        parser.error("no prompt: give --prompt TEXT, -f FILE, or pipe it in")
    return options


def read_prompt(options: argparse.Namespace) -> str:
    """The prompt, to the character: a final newline of a file or pipe is part of it."""
    if options.prompt not in (None, "-"):
        return str(options.prompt)
    try:
        raw = sys.stdin.buffer.read() if options.file in (None, "-") else Path(options.file).read_bytes()
        return raw.decode()
    except OSError as error:
        raise pydflash.PydflashError(f"cannot read the prompt from {options.file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise pydflash.PydflashError(f"the prompt is not UTF-8: {error}") from None


def open_session(options: argparse.Namespace) -> pydflash.Session:
    target, draft = options.target, options.draft
    if options.no_draft and target is None:
        target = models.target_path()
    return pydflash.Session(
        target,
        draft,
        n_ctx=options.n_ctx,
        kv_type=kv_type_of(options.kv_type),
        budget=16 if options.budget is None else options.budget,
        chain=options.chain,
        device=options.device,
    )


def generate(session: pydflash.Session, prompt: str, options: argparse.Namespace) -> pydflash.Result:
    """Runs, and writes the text as it comes unless it is wanted as JSON. Ctrl-C ends the run at its next step."""
    interrupted = False

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True
        session.cancel()

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        for chunk in session.stream(
            prompt,
            max_tokens=options.n_gen,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            seed=options.seed,
        ):
            if not options.json:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
            if interrupted:
                session.cancel()
            if chunk.result is not None:
                return chunk.result
    finally:
        signal.signal(signal.SIGINT, previous)
    raise AssertionError("a run ends with a result")


def as_json(result: pydflash.Result) -> str:
    stats = result.stats
    return json.dumps(
        {
            "text": result.text,
            "ids": result.ids,
            "n_prompt": stats.n_prompt,
            "n_generated": stats.n_generated,
            "n_steps": stats.n_steps,
            "mean_accepted": stats.mean_accepted,
            "accepted_by_depth": stats.accepted_by_depth,
            "prefill_tps": stats.prefill_tps,
            "decode_tps": stats.decode_tps,
            "ms": stats.ms,
            "output_hash": stats.output_hash,
            "finish_reason": result.finish_reason,
        }
    )


def figures(result: pydflash.Result, temperature: float) -> str:
    stats = result.stats
    milliseconds = " ".join(f"{name} {ms:.0f}" for name, ms in stats.ms.items())
    seed = f" | seed {result.seed}" if temperature else ""
    return (
        f"{stats.n_prompt} + {stats.n_generated} tokens | {stats.n_steps} passes, {stats.mean_accepted:.2f} tokens each"
        f" | prefill {stats.prefill_tps:.1f} tok/s, decode {stats.decode_tps:.1f} tok/s | ms: {milliseconds}"
        f" | {result.finish_reason} | {stats.output_hash}{seed}"
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal may not know every character
    try:
        prompt = read_prompt(options)
        with open_session(options) as session:
            result = generate(session, prompt, options)
        if options.json or sys.stdout.isatty():  # a file gets the text to the character
            print(as_json(result) if options.json else "", flush=True)
    except pydflash.PydflashError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, pydflash.ArgumentError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    print(figures(result, options.temperature), file=sys.stderr)
    return 130 if result.finish_reason == "cancelled" else 0


if __name__ == "__main__":
    sys.exit(main())
