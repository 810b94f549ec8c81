"""The command line: one module a command, what several of them share in `common`, what terminals need in `terminal`.

A command module has `HELP`, a line; `add_arguments(parser)`; and `run(options)`, which returns the exit code. Results
go to stdout, all else to stderr. Exit codes: 0 done, 1 could not, 2 wrong usage, 130 stopped by Ctrl-C. Modules import
what is heavy only when their command runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module

from pydflash import __version__
from pydflash.errors import ArgumentError, PydflashError

COMMANDS = ("run", "chat", "plan", "info", "pull", "convert", "bench")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; ends the program when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="pydflash", description="GGUF models of the Qwen3.5 kind with DFlash drafting.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"pydflash {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = import_module(f"pydflash.cli.{name}")
        about, _, details = (module.__doc__ or "").partition("\n\n")
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=about,
            epilog=details,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, usage_error=command.error)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # for the life of the process
    options = parse_arguments(arguments)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal may not know every character
    try:
        code = int(options.run(options))
        sys.stdout.flush()
        return code
    except PydflashError as error:
        report(error)
        return 2 if isinstance(error, ArgumentError) else 1
    except KeyboardInterrupt:
        return 130
    except OSError as error:  # of our output: all other files have errors of their own
        if not isinstance(error, BrokenPipeError):  # else whoever read it has left
            report(PydflashError(f"cannot write the output: {error.strerror or error}"))
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def report(error: PydflashError) -> None:
    """Says what went wrong; whatever a file has put into the sentence cannot drive the terminal."""
    from pydflash.cli.terminal import visible

    print(f"error: {visible(str(error))}", file=sys.stderr)
