"""Options that several commands share, and what they stand for: models, a session, a run's settings."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydflash.errors import ArgumentError, HubError, ModelFileError

if TYPE_CHECKING:
    import pydflash

# What `Session` takes of it. None: not given, so that whatever opens the session has its own default.
SESSION_OPTIONS = (
    *("n_ctx", "kv_type", "budget", "chain", "copying", "device", "n_batch", "n_ring", "n_threads"),
    *("cache_dir", "cache_size"),
)


def add_models(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """--target and --draft."""
    group = parser.add_argument_group("models")
    shipped = "" if required else " (default: the tiny one that ships with pydflash)"
    group.add_argument(
        "--target", required=required, metavar="GGUF", help=f"the model, or the name of one that was pulled{shipped}"
    )
    group.add_argument("--draft", metavar="PATH", help="its DFlash drafter: a GGUF, or a folder as z-lab lays it out")


BUDGET_HELP = "tree nodes besides the root, 0 to 63; auto: what is fastest here (default: auto)"


def budget(text: str) -> int | str:
    """A budget as a command line gives it."""
    return text if text == "auto" else int(text)


def add_session(parser: argparse.ArgumentParser, *, runs: bool = True, n_ctx: str = "the largest that fits") -> None:
    """Where a session runs and what it sets memory aside for; runs: a plan has no threads. n_ctx: its default, in
    words."""
    group = parser.add_argument_group("session")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), help="auto (default) is cuda where that can be had")
    group.add_argument("--n-ctx", type=int, metavar="N", help=f"context in tokens (default: {n_ctx})")
    group.add_argument(
        "--kv-type",
        metavar="TYPE",
        help="f32, f16, q8_0 or q4_0, a pair for K and V: q8_0,q4_0, or auto (default): the first of f16, q8_0 and "
        "q4_0 that fits",
    )
    group.add_argument("--n-batch", type=int, metavar="N", help="prefill chunk in tokens (default: 512)")
    group.add_argument("--n-ring", type=int, metavar="N", help="positions the drafter sees (default: 4096)")
    if runs:
        group.add_argument("--n-threads", type=int, metavar="N", help="of the CPU (default: one for each core)")


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Long prompts kept on disk."""
    group = parser.add_argument_group("documents read before")
    group.add_argument("--cache-dir", metavar="DIR", help="keep long prompts there, so that they are read only once")
    group.add_argument("--cache-size", metavar="SIZE", help="what that may take (default: 16GiB)")


def add_documents(parser: argparse._ArgumentGroup) -> None:
    """--file, which may be given again."""
    parser.add_argument(
        "--file", action="append", metavar="PATH", help="a document, or a folder of them; may be given again"
    )


def add_load(parser: argparse._ArgumentGroup) -> None:
    """--load, for `open_session`."""
    parser.add_argument(
        "--load",
        metavar="PATH",
        help="go on with a session that was saved; its models and settings, where none are given",
    )


def add_thinking(parser: argparse._ArgumentGroup) -> None:
    """--think and --no-think; neither leaves it to the model's template."""
    parser.add_argument(
        "--think",
        dest="thinking",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether the model thinks before it answers (default: as its template has it)",
    )


def add_drafting(parser: argparse.ArgumentParser) -> None:
    """How a session drafts; `check_drafting` belongs to it."""
    group = parser.add_argument_group("drafting")
    group.add_argument("--budget", type=budget, metavar="N", help=BUDGET_HELP)
    group.add_argument("--chain", action="store_true", default=None, help="draft one line of tokens instead of a tree")
    group.add_argument(
        "--no-copying",
        dest="copying",
        action="store_false",
        default=None,
        help="draft nothing from what stood in the text before",
    )
    group.add_argument("--no-draft", action="store_true", help="decode plainly; the drafter is not opened")


def check_drafting(options: argparse.Namespace) -> None:
    """Ends the program when --no-draft meets what is for drafters."""
    if options.no_draft and (options.draft or options.chain or options.budget):
        options.usage_error("--no-draft goes without --draft, --chain and --budget")


def add_sampling(parser: argparse.ArgumentParser, *, n_gen: int | None) -> None:
    """How tokens are chosen and when a text ends; `sampling` reads it."""
    group = parser.add_argument_group("sampling")
    most = "until the context is full" if n_gen is None else str(n_gen)
    group.add_argument(
        "--n-gen", "-n", type=int, default=n_gen, metavar="N", help=f"at most N tokens (default: {most})"
    )
    group.add_argument("--temperature", type=float, metavar="T", help="0 (default) takes the likeliest token")
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest (default 0: all)")
    group.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest share P (default: 1)")
    group.add_argument("--min-p", type=float, metavar="P", help="leave out what is below P times the likeliest")
    group.add_argument(
        "--repeat-penalty", type=float, metavar="R", help="divide the logits of tokens that were there (default: 1)"
    )
    group.add_argument(
        "--presence-penalty", type=float, metavar="A", help="take A off the logits of tokens that were there"
    )
    group.add_argument("--frequency-penalty", type=float, metavar="A", help="the same for every time they were there")
    group.add_argument(
        "--logit-bias",
        action="append",
        type=_bias,
        metavar="ID=B",
        help="add B to the logit of token ID; may be given again",
    )
    group.add_argument("--seed", type=int, metavar="S", help="of the draws (default: a random one, reported)")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be given again")
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on behind the model's end tokens")


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    return int(token), float(bias)


_bias.__name__ = "ID=B"  # argparse names the type in its refusal


def sampling(options: argparse.Namespace) -> pydflash.Sampling:
    """The settings of a run, checked; what was not given is as `Sampling` has it."""
    from pydflash import Sampling

    given: dict[str, Any] = {item.name: getattr(options, item.name, None) for item in fields(Sampling)}
    given["logit_bias"] = dict(options.logit_bias) if options.logit_bias else None
    given = {name: x for name, x in given.items() if x is not None}
    return Sampling(**given | {"max_tokens": options.n_gen})


def add_format(parser: argparse.ArgumentParser) -> None:
    """What the text must look like; `response_format` reads it."""
    group = parser.add_argument_group("form of the answer").add_mutually_exclusive_group()
    group.add_argument("--json-schema", metavar="FILE", help="JSON that this schema allows")
    group.add_argument("--lark", metavar="FILE", help="text of this grammar, in llguidance's kind of Lark")
    group.add_argument("--regex", metavar="PATTERN", help="text that this pattern matches as a whole")
    group.add_argument("--choice", action="append", metavar="TEXT", help="one of these; give it once for each")


def response_format(options: argparse.Namespace) -> Mapping[str, Any] | None:
    """The form asked for, as `Session.generate` takes it."""
    if options.json_schema is not None:
        try:
            return {"type": "json_schema", "json_schema": {"schema": json.loads(_read(options.json_schema))}}
        except (ValueError, RecursionError) as error:
            raise ArgumentError(f"the schema {options.json_schema} is not JSON: {error}") from None
    if options.lark is not None:
        return {"lark": _read(options.lark)}
    if options.regex is not None:
        return {"regex": options.regex}
    if options.choice is not None:
        return {"choice": options.choice}
    return None


def find_models(target: str, draft: str | None) -> tuple[str, str | None]:
    """Target and drafter as paths. What is no file may be the name of something that `pydflash pull` has got."""

    def is_path(name: str) -> bool:
        return os.path.exists(name) or (name.endswith(".gguf") and ":" not in name)

    if is_path(target) and (draft is None or is_path(draft) or "/" not in draft):
        return target, draft
    from pydflash import hub

    try:
        pair = hub.pull(target, draft=draft, local_files_only=True)
    except HubError as error:
        if error.reason != "offline":
            raise
        names = target if draft is None else f"{target} --draft {draft}"
        raise HubError(f"{target} is not on this machine yet: run 'pydflash pull {names}'", reason="offline") from None
    return os.fspath(pair.target), None if pair.draft is None else os.fspath(pair.draft)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror}", path=path) from None
    except UnicodeDecodeError:
        raise ModelFileError(f"{path} is not UTF-8", path=path) from None


def given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of the options that the command line has."""
    from pydflash.options import kv_type_of

    found: dict[str, Any] = {name: getattr(options, name, None) for name in names}
    found = {name: value for name, value in found.items() if value is not None}
    if "kv_type" in found:
        found["kv_type"] = kv_type_of(found["kv_type"])
    return found


def open_session(
    options: argparse.Namespace, *, load: str | None = None, budget: int | None = None
) -> pydflash.Session:
    """A session as the options of models, session and, where a command has it, drafting say.

    load: what a session has saved, to go on with; the settings that the command line leaves open are the file's then.
    """
    from pydflash import Session, models

    target, draft = options.target, options.draft
    plain = getattr(options, "no_draft", False)
    if target is not None:
        target, draft = find_models(target, draft)
    elif plain and load is None:
        target = models.target_path()
    if plain:
        draft = None
    settings = given(options, SESSION_OPTIONS)
    if budget is not None:
        settings["budget"] = budget
    return Session(target, draft, **settings) if load is None else Session.load(load, target, draft, **settings)
