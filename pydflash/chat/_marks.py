"""Tells a template's own characters from those it was given, in the text it rendered.

A special token's spelling has a character to know it by, mostly "<". In whatever a template is given each such
character is exchanged for a stand-in, one that the text does not hold, and exchanged back once the text has been split
at the special tokens that are left: those the template wrote itself. A stand-in is one character for one, is no white
space and no letter, so trimming, splitting and counting go as before; what a template looks for in a text ("</think>")
is marked in the template too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from pydflash.chat._engine import Engine

# Signs that hardly anybody writes, printable ones since templates may show what they get as Python would: Byzantine
# musical notation, Tai Xuan Jing, dominoes; and, for the text that has all of those, a plane of private use.
_SIGNS = ((0x1D000, 0x1D0F5), (0x1D300, 0x1D356), (0x1F030, 0x1F093), (0x100000, 0x10FFFD))
_TAKEN = re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in _SIGNS) + "]")
_QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_LITERAL = re.compile(_QUOTED, re.DOTALL)
_METHODS = "startswith|endswith|split|replace|find|rfind|index|count|strip|lstrip|rstrip"
# A literal or a variable that is looked for in a text, not written.
_SOUGHT = re.compile(
    rf"((?:\.\s*(?:{_METHODS})|\|\s*(?:replace|trim))\s*\(\s*|[=!]=\s*)({_QUOTED})"
    rf"|({_QUOTED})(?=\s*[=!]=|\s+(?:not\s+)?in\b)",
    re.DOTALL,
)
_SOUGHT_VARIABLE = re.compile(
    rf"(\.\s*(?:{_METHODS})\s*\(\s*)([a-z_]\w*)(?=\s*[,)])"
    r"|\b((?:if|elif|and|or|not)\s+)([a-z_]\w*)(?=\s+(?:not\s+)?in\b)",
    re.IGNORECASE,
)
_BETWEEN_TAGS = re.compile(r"[%}#]\}(.*?)(?:\{[{%#]|\Z)", re.DOTALL)
# Words of the format itself, which templates compare with; a text that is just one of them cannot do harm.
_FORMAT = frozenset(
    """role content type text reasoning_content tool_calls tool_call_id id function name arguments description
    parameters properties required items enum object string number integer boolean array""".split()  # noqa: SIM905
)


class Marks:
    """Stand-ins for one vocabulary and one template.

    specials: spellings of the special tokens. Those of letters, digits and white space alone have no
        character to be known by, and are left out of `known`.
    """

    def __init__(self, specials: Iterable[str], source: str) -> None:
        self._source = source
        by_pivot = {special: pivot for special in specials if (pivot := _pivot(special))}
        self.known = sorted(by_pivot, key=len, reverse=True)
        # A template that writes "<" + name + ">" leaves the rest of a spelling to what it is given.
        ends = {text[-n:] for text in _written(source) for n in range(1, min(len(text), 64) + 1)}
        self._rests = sorted(
            {
                special[n:]
                for special, pivot in by_pivot.items()
                for n in range(special.index(pivot) + 1, len(special))
                if special[:n] in ends
            }
        )
        self._pivots = sorted(set(by_pivot.values()))
        self._letters = [*self._pivots, *sorted({rest[0] for rest in self._rests} - set(self._pivots))]
        self._any_pivot = re.compile(f"[{re.escape(''.join(self._pivots))}]") if self._pivots else None
        self.pattern = re.compile(f"({'|'.join(map(re.escape, self.known))})") if self.known else None
        self._assign(_TAKEN.findall(source))

    def avoid(self, texts: Iterable[str]) -> bool:
        """Takes other stand-ins if any of these texts holds one of the present ones; whether it had to."""
        taken = {char for text in texts if not text.isascii() for char in _TAKEN.findall(text)}
        if taken.isdisjoint(self._stand_in.values()):
            return False
        self._assign((*_TAKEN.findall(self._source), *taken))
        return True

    def touches(self, text: str) -> bool:
        """Whether a text holds a character that is exchanged."""
        return bool(self._any_pivot and self._any_pivot.search(text)) or self._completes(text)

    def on_name(self, text: str) -> str:
        """The text, marked where a special token might begin."""
        for pivot in self._pivots:  # many times as fast as str.translate
            text = text.replace(pivot, self._stand_in[pivot])
        return text

    def on(self, text: str) -> str:
        """The text, marked where a special token might begin, or be completed."""
        marked = self.on_name(text)
        if self._completes(text):
            at = len(text) - len(text.lstrip())
            marked = marked[:at] + self._stand_in.get(marked[at], marked[at]) + marked[at + 1 :]
        return marked

    def off(self, text: str) -> str:
        """The text as it was before it was marked."""
        for letter, stand_in in self._stand_in.items():
            text = text.replace(stand_in, letter)
        return text

    def engine(self, where: str) -> Engine:
        """The template, looking for marked text where it looked for text."""

        def literal(match: re.Match[str]) -> str:
            before, argument, operand = match.groups()
            return (before or "") + self.on_name(argument or operand)

        def variable(match: re.Match[str]) -> str:
            return f"{match[1] or match[3]}({match[2] or match[4]}|marked)"

        def marked(value: Any) -> Any:
            return self.on_name(value) if isinstance(value, str) else value

        source = _SOUGHT_VARIABLE.sub(variable, _SOUGHT.sub(literal, self._source))
        return Engine(source, where=where, marked=marked, kept=frozenset(self._stand_in.values()))

    def _assign(self, taken: Iterable[str]) -> None:
        taken = set(taken)
        free = (chr(code) for first, last in _SIGNS for code in range(first, last + 1) if chr(code) not in taken)
        self._stand_in = dict(zip(self._letters, free, strict=False))  # never too few of them

    def _completes(self, text: str) -> bool:
        text = text.strip() if self._rests else ""
        return (
            bool(text)
            and text not in _FORMAT
            and any(text.startswith(rest) or rest.startswith(text) for rest in self._rests)
        )


def _pivot(special: str) -> str | None:
    return next((char for char in special if not char.isalnum() and not char.isspace()), None)


def _written(source: str) -> Iterator[str]:
    """Every text that a template may write as it stands."""
    for match in _LITERAL.finditer(source):
        yield match[0][1:-1]
    yield re.split(r"\{[{%#]", source, maxsplit=1)[0]
    for match in _BETWEEN_TAGS.finditer(source):
        yield match[1]
