"""The conversation of `pydflash chat`: messages, commands, and what Ctrl-C means where.

A command that cannot be done is one sentence, and the conversation goes on as it was.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from pydflash.cli import report, terminal
from pydflash.cli.answer import AnswerWriter
from pydflash.cli.lines import Lines
from pydflash.errors import ArgumentError, PydflashError, nearest

if TYPE_CHECKING:
    import pydflash
    from pydflash.results import Result

HELP = """\
/file PATH         give the model a document, or a folder of them, to read
/system TEXT       what the model is told before all else; without TEXT: nothing
/think on|off      whether the model thinks before it answers; without either: as its template has it
/draft on|off      show tokens that the drafter proposed in another shade
/rewind [N]        take back the last N messages of yours (default: 1), documents too, and what followed them
/save PATH         write the conversation to a file
/load PATH         go on with one that was written
/stats             figures of the last answer, and of the session
/help              this list
/quit              leave, as Ctrl-D does
A message that begins with a slash is typed with two."""


class Repl:
    """A conversation on an open session, which stays the caller's.

    sampling, thinking: of every answer, as `Session.ask` has them. drafted: show drafted tokens in another shade.
    """

    def __init__(
        self, session: pydflash.Session, sampling: pydflash.Sampling, *, thinking: bool | None, drafted: bool
    ) -> None:
        self.lines = Lines()
        self._session = session
        self._sampling = sampling
        self._thinking = thinking
        self._drafted = drafted
        self._last: Result | None = None
        self._failed = False
        self._commands: dict[str, Callable[[str], None]] = {
            "file": self.file,
            "system": self.system,
            "think": self._think,
            "draft": self._draft,
            "rewind": self._rewind,
            "save": self._save,
            "load": self.load,
            "stats": self._stats,
            "help": lambda _: _say(HELP),
        }

    def loop(self) -> int:
        """Message after message; the exit code."""
        try:
            self._take_all()
        finally:
            self.lines.save()
        return 1 if self._failed and not self.lines.interactive else 0

    def _take_all(self) -> None:
        while True:
            try:
                message = self.lines.message("> ")
            except EOFError:
                if self.lines.interactive:
                    print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                if not self.lines.interactive:
                    raise
                print(file=sys.stderr)  # the line typed so far is gone
                continue
            if message.strip() in ("/quit", "/exit"):
                return
            try:
                self._take(message)
            except PydflashError as error:
                report(error)
                self._failed = True
            except KeyboardInterrupt:  # a second Ctrl-C, which does not wait for the step
                if not self.lines.interactive:
                    raise
                _say("stopped")

    def _take(self, message: str) -> None:
        if message.startswith("//"):
            self._ask(message[1:])
        elif message.startswith("/"):
            name, _, rest = message[1:].strip().partition(" ")
            if name not in self._commands:
                advice = nearest(name, self._commands) or "; /help lists them"
                raise ArgumentError(f"there is no command {name!r}{advice}")
            self._commands[name](rest.strip())
        elif message.strip():
            self._ask(message)

    def _ask(self, question: str) -> None:
        session = self._session
        writer = AnswerWriter(session.tokenizer, drafted=self._drafted)
        try:
            result = terminal.streamed(
                session,
                lambda progress: session.stream_ask(
                    question, self._sampling, thinking=self._thinking, progress=progress
                ),
                writer.push,
            )
        finally:
            writer.finish()
        self._last = result
        if result.finish_reason == "cancelled":
            if not self.lines.interactive:
                raise KeyboardInterrupt
            _say("stopped; what was said so far stands")
        elif result.finish_reason == "length":
            _say("cut: it has reached --n-gen, or the context is full")

    # ---- commands ------------------------------------------------------------------------------------------------

    def file(self, path: str) -> None:
        """Reads a document, or a folder of them."""
        session = self._session
        n_tokens, n_messages = session.n_tokens, len(session.messages)
        _needed(path, "/file PATH")
        with terminal.cancelling(session) as interrupted, terminal.reading(f"reading {path}", interrupted) as progress:
            try:
                documents = session.append_document(path, progress=progress)
            except PydflashError:
                if not interrupted.pressed:  # Ctrl-C ends the program that reads a PDF, too
                    raise
        if len(session.messages) == n_messages:
            if not self.lines.interactive:
                raise KeyboardInterrupt
            _say("stopped; the document is not part of the conversation")
        else:
            left_out = ", ".join(f"{n:,} {reason}" for reason, n in documents.skipped.items())
            count = "1 document" if len(documents) == 1 else f"{len(documents):,} documents"
            _say(
                f"{path}: {count}{f' (left out: {left_out})' if left_out else ''}, {session.n_tokens - n_tokens:,} "
                f"tokens; {session.n_tokens:,} of {session.n_ctx:,} used"
            )

    def system(self, text: str) -> None:
        """Puts a system message first, in the place of the one there was."""
        others = [message for message in self._session.messages if message["role"] != "system"]
        self._session.messages = [{"role": "system", "content": text}, *others] if text else others

    def load(self, path: str) -> None:
        """Goes on with what is in a file."""
        self._session.restore(_needed(path, "/load PATH"))
        self.say_what_is_held()

    def _save(self, path: str) -> None:
        self._session.save(_needed(path, "/save PATH"))

    def _rewind(self, text: str) -> None:
        if text and not (text.isascii() and text.isdigit() and int(text)):
            raise ArgumentError(f"/rewind takes a count of messages, not {text!r}")
        messages = self._session.messages
        places = [i for i, message in enumerate(messages) if message["role"] == "user"]
        n = int(text or 1)
        if n > len(places):
            raise ArgumentError(f"there are {len(places)} messages of yours to take back, not {n}")
        self._session.messages = messages[: places[-n]]
        _say(f"messages of yours that stand: {len(places) - n}")

    def _think(self, text: str) -> None:
        self._thinking = _switch(text, "/think") if text else None

    def _draft(self, text: str) -> None:
        self._drafted = _switch(text, "/draft")

    def _stats(self, _: str) -> None:
        if self._last is not None:
            from pydflash.cli.run import figures

            _say(figures(self._last, self._sampling.temperature))
        self.say_what_is_held()

    def say_what_is_held(self) -> None:
        """Messages, tokens, memory."""
        session = self._session
        mib = sum(session.memory.values()) / (1 << 20)
        used = f"{session.n_tokens:,} of {session.n_ctx:,} tokens used"
        _say(f"{len(session.messages):,} messages, {used}; {mib:,.0f} MiB on the {session.device}")


def _say(text: str) -> None:
    """What is not the model's goes to stderr."""
    print(terminal.visible(text), file=sys.stderr, flush=True)


def _needed(text: str, usage: str) -> str:
    if not text:
        raise ArgumentError(f"the command is {usage}")
    return text


def _switch(text: str, command: str) -> bool:
    if text not in ("on", "off"):
        raise ArgumentError(f"the command is {command} on or {command} off")
    return text == "on"
