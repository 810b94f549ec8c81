"""A model's Jinja template, run by `minijinja` in the environment Hugging Face gives templates.

Owns what is global to templates (helpers, whitespace rules, where Python's Jinja behaves otherwise) and the sentences
for whatever goes wrong in one. A template comes with a model file, so it is somebody else's program: it reads no files,
its steps are counted, and it works on copies.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

from pydflash.errors import ArgumentError, UnsupportedModelError

_MAX_SOURCE = 1 << 18  # characters; the longest template seen has 17,000
_MAX_OPERATORS = 2000  # in one tag; longer chains would overflow the parser's stack
_STEPS, _STEPS_A_VALUE = 1_000_000, 1000  # the engine does some 10 million steps a second

# Marks for training on the assistant's words alone; they render nothing.
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_TAG = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)
_OTHER = re.compile(r"[^\x00-\x7f]")
_OPERATOR = re.compile(r"[-+*/%~|.\[(<>=]|\b(?:not|and|or|in|is|if|else)\b")


class _RefusedError(Exception):
    """What a template says by `raise_exception`."""


class Engine:
    """One compiled template.

    marked: a filter by that name, for a template that was changed to use it. kept: characters that JSON never escapes.
    """

    def __init__(
        self, source: str, *, where: str, marked: Callable[[Any], Any] | None = None, kept: Collection[str] = ()
    ) -> None:
        from minijinja import Environment, TemplateError

        self._where = where
        self._error: type[Exception] = TemplateError
        if len(source) > _MAX_SOURCE or any(
            len(_OPERATOR.findall(tag)) > _MAX_OPERATORS for tag in _TAG.findall(source)
        ):
            raise UnsupportedModelError(f"{where} is too long or too deep to be one: {len(source)} characters")
        filters: dict[str, Callable[..., Any]] = {
            "tojson": functools.partial(to_json, kept=kept),
            "trim": _trim,
            "length": _length,
            "count": _length,
        }
        if marked is not None:
            filters["marked"] = marked
        self._environment = Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            debug=True,  # errors then name what is undefined
            fuel=_STEPS,
            filters=filters,
            tests={"sequence": _is_sequence, "iterable": _is_sequence, "number": _is_number, "float": _is_float},
            globals={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
            auto_escape_callback=_never,
        )
        try:
            source = _GENERATION.sub(r"{%\1 \2with \3%}", source)
            self._environment.add_template("chat", source)
            self.variables = frozenset(self._environment.undeclared_variables_in_str(source))
        except (TemplateError, ValueError) as error:
            raise UnsupportedModelError(f"{where} cannot be read: {_said(error)}") from None

    def render(self, variables: Mapping[str, Any], *, n_values: int) -> str:
        """The text. n_values: how many values the variables hold; long conversations may take more steps."""
        self._environment.fuel = fuel = _STEPS + _STEPS_A_VALUE * n_values
        try:
            return self._environment.render_template("chat", **variables)
        except _RefusedError as error:
            raise ArgumentError(f"{self._where} refuses these messages: {error}") from None
        except self._error as error:
            kind = getattr(error, "kind", "")
            if kind == "OutOfFuel":
                raise UnsupportedModelError(
                    f"{self._where} does not come to an end: it was stopped after {fuel} steps{_line(error)}"
                ) from None
            if kind in ("UnknownFilter", "UnknownFunction", "UnknownTest", "TemplateNotFound"):
                raise UnsupportedModelError(f"{self._where} cannot be run: {_said(error)}") from None
            raise ArgumentError(f"{self._where} cannot render these messages: {_said(error)}") from None
        except Exception as error:  # out of a helper of ours, or a method of Python's that the template called
            raise ArgumentError(f"{self._where} cannot render these messages: {error}") from None
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # the engine's, which is no Exception
                raise
            raise UnsupportedModelError(f"{self._where} cannot be run: {error}") from None


class Number:
    """A float that prints as Python prints it, as the engine's own numbers do not (2.0 becomes 2, 1e22 a row of 0)."""

    __slots__ = ("value",)

    def __init__(self, value: float) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)

    def __bool__(self) -> bool:
        return bool(self.value)


def as_value(number: float) -> float | Number:
    """A float as the engine may have it."""
    return Number(number) if number.is_integer() or not re.fullmatch(r"-?\d+\.\d+", repr(number)) else number


def _line(error: Exception) -> str:
    line = getattr(error, "line", None)
    return f" at line {line}" if line else ""


def _said(error: Exception) -> str:
    detail = getattr(error, "detail", None) or str(error).splitlines()[0]
    return f"{detail}{_line(error)}"


def _raise_exception(message: object = "") -> NoReturn:
    raise _RefusedError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
    kept: Collection[str] = (),
) -> str:
    """JSON as Hugging Face's templates write it; kept: characters that ensure_ascii leaves alone."""
    text = json.dumps(
        value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys, default=_plain
    )
    if ensure_ascii and not text.isascii():
        text = _OTHER.sub(lambda match: match[0] if match[0] in kept else json.dumps(match[0])[1:-1], text)
    return text


def _plain(value: object) -> object:
    if isinstance(value, Number):
        return value.value
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _trim(value: object, chars: str | None = None) -> str:
    return ("" if value is None else str(value)).strip(chars)


def _length(value: Any) -> int:
    return 0 if value is None else len(value)  # None is what undefined looks like from here


def _is_sequence(value: object) -> bool:
    return isinstance(value, (str, list, tuple, dict))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, Number))


def _is_float(value: object) -> bool:
    return isinstance(value, (float, Number))


def _never(name: str) -> bool:
    return False
