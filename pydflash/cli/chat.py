"""Talk with a model: answers stream, Ctrl-C stops one and keeps the conversation, Ctrl-D leaves.

    pydflash chat --target model.gguf --draft drafter/
    pydflash chat --file contract.pdf --file annexes/
    pydflash chat --load contract.session < questions.txt > answers.txt

Type /help for what else can be typed. A backslash at the end of a line goes on in the next, three double quotes begin
a message of several lines and end it. Without a terminal each line of stdin is a message.
"""

from __future__ import annotations

import argparse
import sys

from pydflash.cli import common
from pydflash.cli.repl import Repl

HELP = "talk with a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    group = parser.add_argument_group("conversation")
    common.add_documents(group)
    group.add_argument("--system", metavar="TEXT", help="what the model is told before all else")
    common.add_load(group)
    common.add_thinking(group)
    group.add_argument("--show-drafted", action="store_true", help="drafted tokens in another shade, as /draft on")
    common.add_models(parser)
    common.add_session(parser)
    common.add_cache(parser)
    common.add_drafting(parser)
    common.add_sampling(parser, n_gen=None)


def run(options: argparse.Namespace) -> int:
    """The conversation."""
    common.check_drafting(options)
    sampling = common.sampling(options)
    with common.open_session(options, load=options.load) as session:
        repl = Repl(session, sampling, thinking=options.thinking, drafted=options.show_drafted)
        if options.load is not None:
            repl.say_what_is_held()
        if options.system is not None:
            repl.system(options.system)
        for path in options.file or ():
            repl.file(path)
        if repl.lines.interactive:
            print("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.", file=sys.stderr)
        return repl.loop()
