"""Continue a prompt, or answer it with --chat: text to stdout as it comes, all else to stderr.

    pydflash run --prompt "def fibonacci(n):"
    pydflash run -f prompt.txt --target model.gguf --draft drafter/ --temperature 0.7 --seed 1
    pydflash run --chat --file contract.pdf --prompt "Who may end it, and when?"
    git diff | pydflash run --json

Without --target the tiny pair runs that ships with pydflash. The prompt is taken to the character: a final newline of a
file or pipe is part of it. Exit codes: 0 done, 1 could not, 2 wrong usage, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydflash.cli import common, terminal
from pydflash.cli.answer import AnswerWriter
from pydflash.errors import ModelFileError

if TYPE_CHECKING:
    import pydflash
    from pydflash.tokenizer import Tokenizer

HELP = "continue a prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    prompt = parser.add_argument_group("prompt")
    source = prompt.add_mutually_exclusive_group()
    source.add_argument("--prompt", "-p", metavar="TEXT", help="the prompt; '-' reads stdin, as does a pipe without it")
    source.add_argument("--prompt-file", "-f", metavar="FILE", help="read the prompt from a file, '-' for stdin")
    common.add_documents(prompt)
    chat = parser.add_argument_group("chat")
    template = chat.add_mutually_exclusive_group()
    template.add_argument("--chat", action="store_true", help="a user's message, in the model's chat template")
    template.add_argument("--raw", action="store_true", help="text to go on with (default)")
    chat.add_argument("--system", metavar="TEXT", help="what the model is told before all else")
    common.add_thinking(chat)
    common.add_load(chat)
    common.add_models(parser)
    common.add_session(parser)
    common.add_cache(parser)
    common.add_drafting(parser)
    common.add_sampling(parser, n_gen=128)
    common.add_format(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")
    output.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="with --json: each token's log-probability, and the N likeliest instead of it",
    )
    output.add_argument("--show-drafted", action="store_true", help="on a terminal, drafted tokens in another shade")


def run(options: argparse.Namespace) -> int:
    """Runs, and writes the text as it comes unless it is wanted as JSON."""
    common.check_drafting(options)
    if options.prompt is None and options.prompt_file is None and sys.stdin.isatty():
        options.usage_error("no prompt: give --prompt TEXT, -f FILE, or pipe it in")
    if options.logprobs is not None and not options.json:
        options.usage_error("--logprobs goes with --json")
    if not options.chat and any(x is not None for x in (options.system, options.thinking, options.load)):
        options.usage_error("--system, --think, --no-think and --load go with --chat")
    if options.load is not None and options.system is not None:
        options.usage_error("--system goes without --load: the session that was saved has begun already")
    sampling = common.sampling(options)
    form = common.response_format(options)
    prompt = read_prompt(options)
    documents = read_documents(options.file or ())
    with common.open_session(options, load=options.load) as session:
        result = generate(session, prompt, documents, options, sampling, response_format=form)
    if options.json:
        print(json.dumps(as_dict(result, session.tokenizer, chat=options.chat)), flush=True)
    print(figures(result, sampling.temperature), file=sys.stderr)
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


def read_documents(paths: Sequence[str]) -> list[str]:
    """The documents as prompts."""
    if not paths:
        return []
    from pydflash.documents import read_documents

    return [document.as_prompt() for path in paths for document in read_documents(path)]


def generate(
    session: pydflash.Session,
    prompt: str,
    documents: list[str],
    options: argparse.Namespace,
    sampling: pydflash.Sampling,
    **settings: Any,
) -> pydflash.Result:
    """The run; Ctrl-C ends it at its next step."""
    writer = AnswerWriter(session.tokenizer, drafted=options.show_drafted)

    def begin(progress: Callable[[pydflash.Progress], None]) -> Iterator[pydflash.Chunk]:
        if options.chat:
            system = [] if options.system is None else [{"role": "system", "content": options.system}]
            read = [{"role": "user", "content": text} for text in documents]
            session.messages = [*session.messages, *system, *read]
            return session.stream_ask(prompt, sampling, thinking=options.thinking, progress=progress, **settings)
        given: str | list[int] = prompt
        if documents:  # special tokens spelt in them are text
            given = session.tokenize("".join(documents), parse_special=False)
            given += session.tokenize(prompt, add_special=False)
        return session.stream(given, sampling, progress=progress, **settings)

    result = terminal.streamed(session, begin, (lambda _: None) if options.json else writer.push)
    if options.chat or sys.stdout.isatty():  # a file gets a prompt's continuation to the character
        writer.finish()
    return result


def as_dict(result: pydflash.Result, tokenizer: Tokenizer | None, *, chat: bool) -> dict[str, Any]:
    """What --json prints."""
    stats = result.stats
    out: dict[str, Any] = {
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
    if chat:
        out |= {"content": result.content, "reasoning": result.reasoning, "tool_calls": result.tool_calls}
    if result.logprobs is not None:
        out["logprobs"] = [
            {
                "id": token.id,
                "token": _text(tokenizer, token.id),
                "logprob": token.logprob,
                "top": [{"id": i, "token": _text(tokenizer, i), "logprob": logprob} for i, logprob in token.top],
            }
            for token in result.logprobs
        ]
    return out


def _text(tokenizer: Tokenizer | None, token_id: int) -> str | None:
    if tokenizer is None or token_id >= tokenizer.n_vocab:  # a target may have more rows than its vocabulary
        return None
    return tokenizer.decode([token_id])


def figures(result: pydflash.Result, temperature: float) -> str:
    """A run in one line."""
    stats = result.stats
    milliseconds = " ".join(f"{name} {ms:.0f}" for name, ms in stats.ms.items())
    seed = f" | seed {result.seed}" if temperature else ""
    held = f", {result.cached_tokens} of them held already" if result.cached_tokens else ""
    return (
        f"{stats.n_prompt} + {stats.n_generated} tokens{held}"
        f" | {stats.n_steps} passes, {stats.mean_accepted:.2f} tokens each | prefill {stats.prefill_tps:.1f} tok/s, "
        f"decode {stats.decode_tps:.1f} tok/s | ms: {milliseconds}"
        f" | {result.finish_reason} | {stats.output_hash}{seed}"
    )
