"""What is written of measurements: tables on a terminal and in Markdown, CSV, and a section of a file that is ours.

Knows tables and text, not what they are of. A section stands between two comments, `<!-- NAME begin -->` and
`<!-- NAME end -->`; the rest of the file is left as it is.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydflash.errors import DocumentError


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is aligned to the left, the others to the right."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


Block = str | Table  # a paragraph, or a table


def markdown(blocks: Sequence[Block]) -> str:
    """Paragraphs and tables as Markdown."""
    return "\n\n".join(block if isinstance(block, str) else _markdown_table(block) for block in blocks) + "\n"


def _markdown_table(table: Table) -> str:
    lines = [table.heads, *table.rows]
    shown = ["|" + "|".join(f" {cell.replace('|', chr(92) + '|')} " for cell in line) + "|" for line in lines]
    return "\n".join([shown[0], "|" + "|".join(["-"] + ["-:"] * (len(table.heads) - 1)) + "|", *shown[1:]])


def replace_section(path: str | os.PathLike[str], name: str, text: str) -> None:
    """Puts the text between the two comments of that name; a file without them, or none, gets them at its end.

    The file is the old one or the new one at any moment. Raises DocumentError, with the file as it was.
    """
    begin, end = f"<!-- {name} begin -->", f"<!-- {name} end -->"
    before, old, after = section(path, name)
    if old is None and before:
        before = before.rstrip("\n") + "\n\n"
    body = f"{before}{begin}\n\n{text.strip(chr(10))}\n\n{end}{after if old is not None else chr(10)}"
    write_text(path, body)


def section(path: str | os.PathLike[str], name: str) -> tuple[str, str | None, str]:
    """A file's text before, within and behind its section of that name; None within: it has none, or is not there.

    Raises DocumentError for a file that cannot be read, or whose comments are not one pair in order.
    """
    begin, end = f"<!-- {name} begin -->", f"<!-- {name} end -->"
    try:
        text = Path(path).read_bytes().decode() if os.path.exists(path) else ""  # ends of lines stay what they are
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"cannot read {os.fspath(path)}: {error}", reason="unreadable", path=path) from None
    if begin not in text and end not in text:
        return text, None, ""
    before, _, rest = text.partition(begin)
    within, found, after = rest.partition(end)
    if not found or begin in rest or end in before + after:
        raise DocumentError(
            f"{os.fspath(path)} must hold '{begin}' and '{end}' once each and in this order, or neither",
            reason="damaged",
            path=path,
        )
    return before, within, after


def check_writable(path: str | os.PathLike[str]) -> None:
    """DocumentError where a file could not be written: to be asked before long work, not behind it."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise DocumentError(f"cannot write {os.fspath(path)}: there is no folder {folder}", reason="missing", path=path)
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise DocumentError(f"cannot write {os.fspath(path)}", reason="unreadable", path=path)


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a row; the columns are the keys in the order in which they first appear. Raises DocumentError."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    try:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise DocumentError(
            f"cannot write {os.fspath(path)}: {error.strerror}", reason="unreadable", path=path
        ) from None


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """The file is the old one or the new one at any moment. Raises DocumentError."""
    part = f"{os.fspath(path)}.part"
    try:
        Path(part).write_bytes(text.encode())
        os.replace(part, path)
    except OSError as error:
        raise DocumentError(
            f"cannot write {os.fspath(path)}: {error.strerror}", reason="unreadable", path=path
        ) from None


def _unwritable(path: str | os.PathLike[str], error: OSError) -> DocumentError:
    return DocumentError(f"cannot write {os.fspath(path)}: {error.strerror}", reason="unreadable", path=path)
