"""An answer as it streams in: its text to stdout, its thinking and its tool calls to stderr, drafted tokens in another
shade where that is wanted. On a terminal whatever could drive it is spelt out.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

from pydflash.cli.terminal import visible

if TYPE_CHECKING:
    import pydflash
    from pydflash.results import ToolCall
    from pydflash.tokenizer import Tokenizer

STYLES = {"answer": ("", "green"), "thinking": ("dim", "dim green")}  # the target's own tokens, and drafted ones


class AnswerWriter:
    """Shows one answer.

    drafted: show which tokens the drafter proposed; of what a step commits, that is all but the last.
    """

    def __init__(self, tokenizer: Tokenizer | None, *, drafted: bool = False) -> None:
        self._origins = _Origins(tokenizer) if drafted and tokenizer is not None else None
        self._streams = {"answer": _Stream(sys.stdout), "thinking": _Stream(sys.stderr)}
        self._part = ""
        self._calls: list[ToolCall] = []  # whole, once the answer has ended

    def push(self, chunk: pydflash.Chunk) -> None:
        """Shows what a chunk adds."""
        if self._origins is not None:
            self._origins.push(chunk.ids)
        self._write("thinking", chunk.reasoning)
        self._write("answer", chunk.content)
        if chunk.result is not None:
            self._calls = chunk.result.tool_calls

    def finish(self) -> None:
        """Ends the line, and shows the tools that are called."""
        self._end_part()
        for call in self._calls:
            function = call["function"]
            print(visible(f"calls {function['name']}({function['arguments']})"), file=sys.stderr, flush=True)

    def _write(self, part: str, text: str) -> None:
        if not text:
            return
        if self._part != part:
            self._end_part()
            self._part = part
        own, drafted = STYLES[part]
        stream = self._streams[part]
        if self._origins is None:
            stream.write(text, own)
            return
        for piece, was_drafted in self._origins.of(text):
            stream.write(piece, drafted if was_drafted else own)

    def _end_part(self) -> None:
        if self._part:
            self._streams[self._part].end_line()


class _Stream:
    """stdout or stderr: plain to the character, or a terminal with styles."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._console = None
        self._ended = True
        if file.isatty():
            from rich.console import Console

            self._console = Console(file=file, highlight=False, soft_wrap=True)

    def write(self, text: str, style: str) -> None:
        self._ended = text.endswith("\n")
        if self._console is None:
            self._file.write(text)
        else:
            self._console.print(visible(text), style=style or None, end="", markup=False, emoji=False)
        self._file.flush()

    def end_line(self) -> None:
        if not self._ended:
            print(file=self._file, flush=True)
            self._ended = True


class _Origins:
    """Which characters of a text come from drafted tokens.

    The text shown lacks what belongs to the form, such as the tags around thinking, and may lag behind the tokens; so
    each character is looked up in the tokens' own text, from where the last one stood.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decoder = tokenizer.stream_decoder()
        self._n_vocab = tokenizer.n_vocab
        self._ahead: deque[tuple[str, bool]] = deque()  # characters not shown yet, and whether they were drafted

    def push(self, ids: list[int]) -> None:
        for i, token_id in enumerate(ids):
            if token_id < self._n_vocab:  # a target may have more rows than its vocabulary
                text = self._decoder.push(token_id)
                self._ahead.extend((character, i < len(ids) - 1) for character in text)

    def of(self, text: str) -> Iterator[tuple[str, bool]]:
        """The text in pieces of one origin."""
        piece, origin = "", False
        for character in text:
            found = self._next(character)
            if found != origin and piece:
                yield piece, origin
                piece = ""
            piece, origin = piece + character, found
        yield piece, origin

    def _next(self, character: str) -> bool:
        for n_skipped, (ahead, drafted) in enumerate(self._ahead):
            if ahead == character:
                for _ in range(n_skipped + 1):
                    self._ahead.popleft()
                return drafted
        return False
