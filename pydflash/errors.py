"""What can go wrong, as one small tree under `PydflashError`.

Every message is a sentence a user can act on. Where a caller may want to act on it too, the error carries the facts:
the path, or how much was needed and how much there was.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class PydflashError(Exception):
    """The root of everything pydflash raises on purpose.

    path: the file concerned, if one is.
    hint: what to try, where that is known and not already said.
    """

    def __init__(self, message: str, *, path: str | os.PathLike[str] | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.path = None if path is None else os.fspath(path)
        self.hint = hint


class ArgumentError(PydflashError, ValueError):
    """A value the caller passed cannot be used."""


class UnknownOptionError(ArgumentError, TypeError):
    """An option nobody knows; the sentence names the nearest one."""


class ModelFileError(PydflashError):
    """A model file that cannot be opened or read."""


class ModelFormatError(ModelFileError):
    """A malformed model file; the sentence names field and, in a binary file, the offset."""


class UnsupportedModelError(PydflashError):
    """A well-formed model that this runtime does not run."""


class DraftMismatchError(PydflashError):
    """Drafter and target do not belong together."""


class OutOfMemoryError(PydflashError, MemoryError):
    """An allocation that did not fit."""


class ContextFullError(PydflashError):
    """The context is used up.

    need, free: tokens, where known.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | os.PathLike[str] | None = None,
        hint: str | None = None,
        need: int | None = None,
        free: int | None = None,
    ) -> None:
        super().__init__(message, path=path, hint=hint)
        self.need = need
        self.free = free


class DeviceError(PydflashError):
    """A device that is not there, or cannot be used; the sentence says why."""


class DocumentError(PydflashError):
    """A document that cannot be read.

    reason: one of "missing", "unreadable", "empty", "binary", "encoding", "large", "encrypted", "scanned", "damaged"
    and "package" (one is not installed).
    """

    def __init__(self, message: str, *, reason: str, path: str | os.PathLike[str] | None = None) -> None:
        super().__init__(message, path=path)
        self.reason = reason


class HubError(PydflashError):
    """A model that cannot be fetched.

    reason: one of "name" (not one that could be), "missing", "ambiguous", "sharded", "gated", "unauthorized",
    "offline", "network", "busy" (another process fetches it), "space", "disk" and "damaged".
    """

    def __init__(self, message: str, *, reason: str, path: str | os.PathLike[str] | None = None) -> None:
        super().__init__(message, path=path)
        self.reason = reason


class StateError(PydflashError, RuntimeError):
    """A call that makes no sense now: the session is closed, or another call has taken its timeline."""


class SessionFileError(PydflashError):
    """A saved session that cannot be written, is damaged, or does not fit the models and options it is to run on.

    what: what is wrong. where: the part of the file or the setting concerned; empty when it is the file as a whole.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | os.PathLike[str] | None = None,
        hint: str | None = None,
        what: str = "",
        where: str = "",
    ) -> None:
        super().__init__(message, path=path, hint=hint)
        self.what = what
        self.where = where


class InternalError(PydflashError, RuntimeError):
    """A bug of ours, or the backend failed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """', did you mean …?' for a misspelt name, or the empty string when nothing is near."""
    import difflib  # slow to import, and seldom needed

    found = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {found[0]!r}?" if found else ""


def checked_path(path: str | os.PathLike[str]) -> Path:
    """The path; ArgumentError for what is neither text nor a path."""
    try:
        return Path(path)
    except TypeError:
        raise ArgumentError(f"{path!r:.60} is no path: give text or a pathlib.Path") from None


def checked_options(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: an unknown keyword raises `UnknownOptionError`, which names the nearest known one."""
    parameters = list(inspect.signature(function).parameters)
    known = [name for name in parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                advice = nearest(name, known) or f"; it has {', '.join(known)}"
                raise UnknownOptionError(f"{function.__qualname__} has no option {name!r}{advice}")
        return function(*args, **kwargs)

    return checked
