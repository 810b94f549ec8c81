"""What a terminal needs: text that cannot drive it, tables, progress, and Ctrl-C that ends a run and nothing else.

`rich` draws where a terminal is attached; everywhere else lines are plain.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pydflash
    from pydflash._timeline import Progress

# Control characters, what turns the direction of writing, line separators, and halves of characters.
_UNSAFE = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_UNSAFE_IN_TEXT = re.compile(f"[{_UNSAFE}]")
_UNSAFE_IN_LINE = re.compile(f"[{_UNSAFE}\n\t]")
BAR_AFTER = 0.5  # seconds before a bar is drawn
LINE_EVERY = 10  # seconds between lines where there is no terminal


def visible(text: str) -> str:
    """The text with everything that could drive a terminal spelt out, as \\x1b; lines and tabs stay."""
    return _UNSAFE_IN_TEXT.sub(_spelt, text)


def one_line(text: str) -> str:
    """As `visible`, and ends of lines and tabs are spelt out too."""
    return _UNSAFE_IN_LINE.sub(_spelt, text)


def _spelt(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Prints rows of one-line cells; `right` counts the columns that are aligned to the right."""
    cells = [[one_line(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for i, head in enumerate(heads):
            drawn.add_column(head, justify="right" if i in right else "left", overflow="fold")
        for row in cells:
            drawn.add_row(*map(Text, row))  # Text: brackets in a cell are no markup
        Console().print(drawn)
        return
    lines = [list(heads), *cells] if any(heads) else cells
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    for line in lines:
        padded = (
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join(padded).rstrip())


@contextmanager
def progress(label: str, unit: str) -> Iterator[Callable[[float, float], None]]:
    """Gives a function to call with what is done and the total: a bar on stderr, or a line now and then.

    What is over in a moment shows nothing.
    """
    show = _bar(label, unit) if sys.stderr.isatty() else _lines(label, unit)
    try:
        next(show)
        yield lambda done, total: show.send((done, total))
    finally:
        show.close()


def _bar(label: str, unit: str) -> Generator[None, tuple[float, float], None]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[done]}", markup=False),
        TimeRemainingColumn(compact=True),
    )
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(one_line(label), total=None, done="")
    started = time.monotonic()
    try:
        while True:
            done, total = yield
            speed = bar.tasks[task].speed
            rate = f", {speed:,.0f} {unit}/s" if speed else ""
            bar.update(task, completed=done, total=total, done=f"{done:,.0f} of {total:,.0f} {unit}{rate}")
            if time.monotonic() - started > BAR_AFTER:
                bar.start()  # starting twice is fine
    finally:
        bar.stop()


def _lines(label: str, unit: str) -> Generator[None, tuple[float, float], None]:
    started = told = time.monotonic()
    while True:
        done, total = yield
        now = time.monotonic()
        if now - told >= LINE_EVERY and done:
            told = now
            left = (now - started) / done * (total - done)
            line = f"{one_line(label)}: {done:,.0f} of {total:,.0f} {unit}, {left:,.0f} s left"
            print(line, file=sys.stderr, flush=True)


class Cancelling:
    """Ctrl-C for a session's call: `pressed` says that it came."""

    def __init__(self, session: pydflash.Session) -> None:
        self.pressed = False
        self._session = session

    def press(self, _signal: int, _frame: FrameType | None) -> None:
        """The signal's handler; the second time it does not wait for the session."""
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True
        self._session.cancel()

    def repeat(self) -> None:
        """To be called now and then: Ctrl-C may have come before the call had begun, which forgets it then."""
        if self.pressed:
            self._session.cancel()


@contextmanager
def cancelling(session: pydflash.Session) -> Iterator[Cancelling]:
    """Within, Ctrl-C ends the session's call at its next step; pressed again it is a KeyboardInterrupt."""
    state = Cancelling(session)
    previous = signal.signal(signal.SIGINT, state.press)
    try:
        yield state
    finally:
        signal.signal(signal.SIGINT, previous)


def streamed(
    session: pydflash.Session,
    begin: Callable[[Callable[[Progress], None]], Iterator[pydflash.Chunk]],
    show: Callable[[pydflash.Chunk], None],
) -> pydflash.Result:
    """A run: begin(progress) gives its chunks, each is shown; Ctrl-C ends it at its next step."""
    with cancelling(session) as interrupted:
        with reading("reading", interrupted) as progress:
            chunks = begin(progress)
            chunk = next(chunks)
        while True:
            show(chunk)
            interrupted.repeat()
            if chunk.result is not None:
                return chunk.result
            chunk = next(chunks)


@contextmanager
def reading(label: str, interrupted: Cancelling) -> Iterator[Callable[[Progress], None]]:
    """Shows how far a prompt has been evaluated; for the `progress` of a session's calls."""
    with progress(label, "tokens") as show:

        def told(state: Progress) -> None:
            show(state.n_done, state.n_total)
            interrupted.repeat()

        yield told
