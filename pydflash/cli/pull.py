"""Get a model and its drafter from the Hugging Face hub into its ordinary cache; what is there already is not fetched,
and what was stopped goes on.

    pydflash pull qwen3.5-27b
    pydflash pull qwen3.5-27b:Q6_K
    pydflash pull owner/repo@revision:file.gguf --draft owner/drafter
    pydflash chat --target qwen3.5-27b

Where the files lie goes to stdout.
"""

from __future__ import annotations

import argparse

from pydflash.cli import terminal

HELP = "get a model and its drafter by name"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("name", metavar="NAME", help="a known pair, or the target's repository")
    parser.add_argument("--draft", metavar="NAME", help="the drafter's repository; a known pair has one")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit, where the name says none")
    parser.add_argument(
        "--local-files-only",
        action="store_true",
        help="fetch nothing: say where the files lie, or that they are missing",
    )


def run(options: argparse.Namespace) -> int:
    """Fetches both."""
    from pydflash import hub

    with terminal.progress(options.name, "MB") as show:
        pair = hub.pull(
            options.name,
            draft=options.draft,
            revision=options.revision,
            local_files_only=options.local_files_only,
            progress=lambda state: show(state.n_done / 1e6, state.n_total / 1e6),
        )
    print(f"target {pair.target}")
    if pair.draft is not None:
        print(f"draft  {pair.draft}")
    return 0
