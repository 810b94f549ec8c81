"""What is no path is refused in a sentence, wherever a path is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pydflash import ArgumentError, Session, Tokenizer
from pydflash.convert import convert
from pydflash.documents import read_documents


@pytest.mark.parametrize("wrong", [3, b"model.gguf", ["model.gguf"]])
@pytest.mark.parametrize(
    "take",
    [
        lambda wrong: Session(wrong),
        lambda wrong: Session(draft=wrong),
        lambda wrong: Session(cache_dir=wrong),
        Session.load,
        Tokenizer.from_gguf,
        read_documents,
        lambda wrong: convert(wrong, "out.gguf"),
    ],
)
def test_what_is_no_path(take: Callable[[Any], object], wrong: object) -> None:
    with pytest.raises(ArgumentError, match=r"is no path: give text or a pathlib\.Path"):
        take(wrong)


def test_none_is_no_path_either(tiny_session: Session) -> None:
    for take in (tiny_session.save, tiny_session.restore, tiny_session.append_document):
        with pytest.raises(ArgumentError, match="None is no path"):
            take(None)  # type: ignore[arg-type]
