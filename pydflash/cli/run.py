"""Continue a prompt: text to stdout as it comes, one line of figures to stderr.

    pydflash run --prompt "def fibonacci(n):"
    pydflash run -f prompt.txt --target model.gguf --draft drafter/ --temperature 0.7 --seed 1
    git diff | pydflash run --json

Without --target the tiny pair runs that ships with pydflash. The prompt is continued to the character: a final newline
of a file or pipe is part of it. Exit codes: 0 done, 1 could not, 2 wrong usage, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydflash.cli import common, terminal
from pydflash.errors import ModelFileError

if TYPE_CHECKING:
    import pydflash

HELP = "continue a prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    prompt = parser.add_argument_group("prompt")
    source = prompt.add_mutually_exclusive_group()
    source.add_argument("--prompt", "-p", metavar="TEXT", help="the prompt; '-' reads stdin, as does a pipe without it")
    source.add_argument("--prompt-file", "-f", metavar="FILE", help="read the prompt from a file, '-' for stdin")
    prompt.add_argument("--raw", action="store_true", help="no chat template: what happens in any case")
    common.add_models(parser)
    common.add_session(parser)
    common.add_drafting(parser)
    common.add_sampling(parser, n_gen=128)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")


def run(options: argparse.Namespace) -> int:
    """Runs, and writes the text as it comes unless it is wanted as JSON."""
    common.check_drafting(options)
    if options.prompt is None and options.prompt_file is None and sys.stdin.isatty():
        options.usage_error("no prompt: give --prompt TEXT, -f FILE, or pipe it in")
    prompt = read_prompt(options)
    with common.open_session(options) as session:
        result = generate(session, prompt, options)
    if options.json or sys.stdout.isatty():  # a file gets the text to the character
        print(json.dumps(as_dict(result)) if options.json else "", flush=True)
    print(figures(result, options.temperature or 0), file=sys.stderr)
    return 130 if result.finish_reason == "cancelled" else 0


def read_prompt(options: argparse.Namespace) -> str:
    """The prompt, to the character."""
    if options.prompt not in (None, "-"):
        return str(options.prompt)
    path = options.prompt_file
    try:
        raw = sys.stdin.buffer.read() if path in (None, "-") else Path(path).read_bytes()
        return raw.decode()
    except OSError as error:
        raise ModelFileError(f"cannot read the prompt from {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ModelFileError(f"the prompt is not UTF-8: {error}") from None


def generate(session: pydflash.Session, prompt: str, options: argparse.Namespace) -> pydflash.Result:
    """The run; Ctrl-C ends it at its next step."""
    with terminal.cancelling(session) as interrupted:
        for chunk in session.stream(prompt, **common.sampling(options)):
            if not options.json:
                terminal.write(chunk.text)
            if interrupted.pressed:  # it may have come before the run began
                session.cancel()
            if chunk.result is not None:
                return chunk.result
    raise AssertionError("a run ends with a result")


def as_dict(result: pydflash.Result) -> dict[str, Any]:
    """What --json prints."""
    stats = result.stats
    return {
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


def figures(result: pydflash.Result, temperature: float) -> str:
    """A run in one line."""
    stats = result.stats
    milliseconds = " ".join(f"{name} {ms:.0f}" for name, ms in stats.ms.items())
    seed = f" | seed {result.seed}" if temperature else ""
    return (
        f"{stats.n_prompt} + {stats.n_generated} tokens | {stats.n_steps} passes, {stats.mean_accepted:.2f} tokens each"
        f" | prefill {stats.prefill_tps:.1f} tok/s, decode {stats.decode_tps:.1f} tok/s | ms: {milliseconds}"
        f" | {result.finish_reason} | {stats.output_hash}{seed}"
    )
