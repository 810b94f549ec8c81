"""What is continued: prompts by category that ship, benchmarks from a hub, and a long document to put before them.

Prompts are token ids, made once, so that all that is compared is given the very same. Nothing here measures.
"""

from __future__ import annotations

import json
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydflash.errors import ArgumentError, DocumentError, HubError

if TYPE_CHECKING:
    import pydflash

CATEGORIES = ("code", "maths", "prose", "chat", "quoting")
N_SAID = 96  # tokens that the model writes itself before it is to quote them

_SHIPPED = Path(__file__).with_name("prompts.json")
# Folders of the standard library that are no text to read, or are not there everywhere.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib-dynload", "encodings"}


@dataclass(frozen=True)
class Prompt:
    """A prompt as tokens. number: its place in its category, from 0."""

    category: str
    number: int
    ids: Sequence[int]


@dataclass(frozen=True)
class Dataset:
    """A benchmark on the Hugging Face hub, and how a row of it becomes a prompt."""

    path: str
    name: str | None  # of its configuration
    split: str
    form: str  # of the prompt; names are the row's columns


DATASETS = {
    "humaneval": Dataset("openai/openai_humaneval", None, "test", "{prompt}"),
    "gsm8k": Dataset("openai/gsm8k", "main", "test", "Question: {question}\nAnswer:"),
    "math500": Dataset("HuggingFaceH4/MATH-500", None, "test", "Problem: {problem}\n\nSolution:"),
}


def shipped(session: pydflash.Session, category: str, count: int) -> list[Prompt]:
    """The first `count` prompts of a category, or all there are. Those that quote are made by running the session."""
    listed = json.loads(_SHIPPED.read_text(encoding="utf-8"))["prompts"]
    texts = [entry["text"] for entry in listed if entry["category"] == category][:count]
    if category == "quoting":
        every = [quoting(session, text, renamed=i % 2 == 1) for i, text in enumerate(texts)]
    else:
        every = [session.tokenize(text) for text in texts]
    return [Prompt(category, i, ids) for i, ids in enumerate(every)]


def quoting(session: pydflash.Session, begin: str, *, renamed: bool) -> list[int]:
    """A text, and its beginning again: what follows is to be quoted. renamed: with its most frequent name changed.

    The model goes on writing the text itself first, since a small one can only quote what it could have written.
    """
    ids = session.tokenize(begin)
    said = session.generate(ids, budget=0, max_tokens=N_SAID, temperature=0, ignore_eos=True).ids
    names = re.findall(r"[A-Za-z_]{4,}", begin)
    again = begin.replace(max(sorted(set(names)), key=names.count), "another") if renamed and names else begin
    return [*ids, *said, *session.tokenize("\n\n\n" + again)]


def library() -> Path:
    """The standard library of the interpreter that runs."""
    return Path(sysconfig.get_path("stdlib"))


def document(session: pydflash.Session, n: int) -> list[int]:
    """n tokens of a long document: the standard library's sources in the order of their names.

    Raises DocumentError where the library has fewer.
    """
    ids: list[int] = []
    for path in sorted(library().rglob("*.py")):
        if len(ids) >= n:
            break
        if _SKIPPED.isdisjoint(path.relative_to(library()).parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            ids += session.tokenize(text, parse_special=False)
    if len(ids) < n:
        raise DocumentError(
            f"the standard library in {library()} has {len(ids)} tokens, not the {n} asked for", reason="empty"
        )
    return ids[:n]


def from_dataset(session: pydflash.Session, name: str, count: int) -> list[Prompt]:
    """`count` prompts of a benchmark, spread evenly over it.

    name: one of DATASETS, read from the hub by the package `datasets`; or NAME=FILE, its rows as lines of JSON.
    Raises ArgumentError, DocumentError, HubError.
    """
    name, _, file = name.partition("=")
    if name not in DATASETS:
        raise ArgumentError(f"the dataset {name!r} is not known; it must be one of {', '.join(DATASETS)}")
    rows = _from_file(file) if file else _from_hub(DATASETS[name])
    try:
        texts = [DATASETS[name].form.format_map(rows[i * len(rows) // count]) for i in range(min(count, len(rows)))]
    except (KeyError, TypeError) as error:
        raise DocumentError(
            f"{file or DATASETS[name].path} is not {name}: a row lacks {error}", reason="damaged"
        ) from None
    return [Prompt(name, i, session.tokenize(text, parse_special=False)) for i, text in enumerate(texts)]


def _from_file(file: str) -> list[Any]:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except OSError as error:
        raise DocumentError(f"cannot read {file}: {error.strerror}", reason="unreadable", path=file) from None
    except ValueError as error:
        raise DocumentError(f"{file} is not lines of JSON: {error}", reason="damaged", path=file) from None
    if not rows:
        raise DocumentError(f"{file} holds no rows", reason="empty", path=file)
    return rows


def _from_hub(dataset: Dataset) -> Any:
    try:
        import datasets
    except ImportError:
        raise DocumentError(
            f"{dataset.path} is read by the package datasets, which is not installed: pip install 'pydflash[bench]', "
            "or give its rows as lines of JSON: NAME=FILE",
            reason="package",
        ) from None
    try:
        return datasets.load_dataset(dataset.path, dataset.name, split=dataset.split)
    except Exception as error:  # each of the many layers below has errors of its own
        said = str(error).partition("\n")[0]
        raise HubError(
            f"{dataset.path} cannot be had from the hub ({type(error).__name__}: {said}); without one, give its rows "
            "as lines of JSON: NAME=FILE",
            reason="network",
        ) from None
