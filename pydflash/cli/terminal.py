"""What a terminal needs: text that cannot drive it, tables, progress, and Ctrl-C that ends a run and nothing else.

`rich` draws where a terminal is attached; everywhere else lines are plain.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pydflash

# Control characters, what turns the direction of writing, line separators, and halves of characters.
_UNSAFE = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_UNSAFE_IN_TEXT = re.compile(f"[{_UNSAFE}]")
_UNSAFE_IN_LINE = re.compile(f"[{_UNSAFE}\n\t]")
PLAIN_PROGRESS_EVERY = 10  # seconds between lines where there is no terminal


def visible(text: str) -> str:
    """The text with everything that could drive a terminal spelt out, as \\x1b; lines and tabs stay."""
    return _UNSAFE_IN_TEXT.sub(_spelt, text)


def one_line(text: str) -> str:
    """As `visible`, and ends of lines and tabs are spelt out too."""
    return _UNSAFE_IN_LINE.sub(_spelt, text)


def _spelt(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def write(text: str) -> None:
    """Text of a model to stdout: to the character, unless a terminal shows it."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


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
    """Gives a function to call with what is done and the total: a bar on stderr, or a line now and then."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[done]}", markup=False),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(one_line(label), total=None, done="")

            def draw(done: float, total: float) -> None:
                speed = bar.tasks[task].finished_speed or bar.tasks[task].speed
                rate = f", {speed:,.0f} {unit}/s" if speed else ""
                bar.update(task, completed=done, total=total, done=f"{done:,.0f} of {total:,.0f} {unit}{rate}")

            yield draw
        return
    started = told = time.monotonic()

    def tell(done: float, total: float) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= PLAIN_PROGRESS_EVERY:
            told = now
            left = (now - started) / done * (total - done) if done else float("nan")
            line = f"{one_line(label)}: {done:,.0f} of {total:,.0f} {unit}, {left:,.0f} s left"
            print(line, file=sys.stderr, flush=True)

    yield tell


class Interrupted:
    """Whether Ctrl-C came."""

    def __init__(self) -> None:
        self.pressed = False


@contextmanager
def cancelling(session: pydflash.Session) -> Iterator[Interrupted]:
    """Within, Ctrl-C ends the session's run at its next step; pressed again it is a KeyboardInterrupt."""
    state = Interrupted()

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        if state.pressed:
            raise KeyboardInterrupt
        state.pressed = True
        session.cancel()

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield state
    finally:
        signal.signal(signal.SIGINT, previous)
