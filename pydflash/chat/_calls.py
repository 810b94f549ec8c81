"""One tool call as a model writes it, read character by character into a name and arguments that are JSON.

Two ways of writing are read: a JSON object with "name" and "arguments" (Hermes, Qwen3), and <function=name> with
<parameter=key> in it (Qwen3-Coder, Qwen3.5), whose values are typed by the tool's schema. Reading starts behind
<tool_call> and ends with </tool_call>; it may stop anywhere, and the arguments can then be made whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, TypeVar

_T = TypeVar("_T")
_Reader = Generator[None, str, _T]  # is sent a character at a time

_SPACE = " \t\r\n"
_END = "</tool_call>"
_MAX_DEPTH = 64
_JSON_TYPES = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "array": (list,),
    "object": (dict,),
}


_PYTHON = {"True": "true", "False": "false", "None": "null"}


class _MalformedError(Exception):
    """Not what a call looks like."""


class CallReader:
    """Reads one call.

    name: the function's, as soon as it is known. done: </tool_call> was read. failed: this is not a call at all; it
    never got a name.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self._tools = tools
        self._arguments = _Writer()
        self.name: str | None = None
        self.done = False
        self.failed = False
        self._reader = self._read()
        next(self._reader)

    def push(self, text: str) -> int:
        """Reads on; how many of the characters belong to the call."""
        for i, char in enumerate(text):
            try:
                self._reader.send(char)
            except StopIteration:
                self.done = True
                self.close()
                return i + 1
            except _MalformedError:
                if self.name is None:
                    self.failed = True
                    return i + 1
                self.close()
                self._reader = _until_end(char)
                next(self._reader)
        return len(text)

    def take(self) -> str:
        """The arguments' JSON since the last time."""
        return self._arguments.take()

    def close(self) -> None:
        """Makes the arguments whole when no more comes: strings end where they were cut, values other than strings
        that did not end are left out with their key, lists and objects are closed."""
        self._arguments.close()
        if not self._arguments.begun:
            self._arguments.write("{}")

    def _read(self) -> _Reader[None]:
        char = yield from _nonspace()
        if char == "{":
            yield from self._read_object()
            yield from _until_end()
        elif char == "<":
            yield from self._read_tags()
        else:
            raise _MalformedError

    def _read_object(self) -> _Reader[None]:
        """{"name": ..., "arguments": {...}}, keys in any order; others are left out."""
        char = yield from _nonspace()
        while char != "}":
            key = _Writer()
            char = yield from key.read_key(char)
            if key.text in ('"arguments"', '"parameters"') and not self._arguments.begun:
                if char == "{":
                    char = yield from self._arguments.read(char)
                else:
                    value = _Writer()
                    char = yield from value.read(char)
                    self._arguments.write(_unquoted(value.text))
            else:
                value = _Writer()
                char = yield from value.read(char)
                if key.text == '"name"':
                    self._named(json.loads(value.text))
            if char == ",":
                char = yield from _nonspace()
            elif char != "}":
                raise _MalformedError
        if self.name is None:
            raise _MalformedError

    def _read_tags(self) -> _Reader[None]:
        yield from _exactly("function=")
        self._named((yield from _until(">")))
        parameters = _parameters(self._tools, self.name)
        arguments = self._arguments
        arguments.open("{")
        comma = ""
        while True:
            char = yield from _nonspace()
            if char != "<":
                raise _MalformedError
            tag = yield from _until(">")
            if tag in ("/function", "/tool_call"):
                break
            kind, _, key = tag.partition("=")
            if kind != "parameter" or not key.strip():
                raise _MalformedError
            arguments.hold(f"{comma}{_dumped(key.strip())}: ")
            comma = ", "
            types = _types(parameters.get("properties", {}).get(key.strip()), parameters)
            if types <= {"string"}:
                arguments.open('"')
                yield from _value(arguments)
                arguments.shut()
            else:
                value = _Raw()
                yield from _value(value)
                arguments.write(_dumped(_typed(value.text, types)))
        arguments.shut()
        if tag == "/function":
            yield from _until_end()

    def _named(self, name: object) -> None:
        if not isinstance(name, str) or not name.strip() or any(char in name for char in "<\n"):
            raise _MalformedError
        self.name = self.name or name.strip()


class _Raw:
    """Collects text as it is."""

    def __init__(self) -> None:
        self.text = ""

    def say(self, char: str) -> None:
        self.text += char


class _Writer:
    """JSON as it grows: what is held waits for the value behind it, and `close` can end it anywhere."""

    _SHUT = {"{": "}", "[": "]", '"': '"'}  # noqa: RUF012

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._held = ""
        self._open: list[str] = []
        self.begun = False

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def take(self) -> str:
        text = self.text
        self._pieces.clear()
        return text

    def hold(self, text: str) -> None:
        self._held += text

    def write(self, text: str) -> None:
        self._pieces += (self._held, text)
        self._held, self.begun = "", True

    def say(self, char: str) -> None:
        """A character of an open string."""
        self._pieces.append(char if char >= " " and char not in '"\\' else _dumped(char)[1:-1])

    def open(self, bracket: str) -> None:
        self.write(bracket)
        self._open.append(self._SHUT[bracket])

    def shut(self) -> None:
        self._held = ""
        self._pieces.append(self._open.pop())

    def close(self) -> None:
        while self._open:
            self.shut()

    def read(self, char: str) -> _Reader[str]:
        """One value that begins with this character, rewritten; returns the first character behind it that is not
        white space."""
        if len(self._open) > _MAX_DEPTH:
            raise _MalformedError
        if char == '"':
            self.open(char)
            yield from self._read_string()
            self.shut()
            return (yield from _nonspace())
        if char in "{[":
            self.open(char)
            end, comma = self._SHUT[char], ""
            char = yield from _nonspace()
            while char != end:
                self.hold(comma)
                if end == "}":
                    key = _Writer()
                    char = yield from key.read_key(char)
                    self.hold(f"{key.text}: ")
                char = yield from self.read(char)
                comma = ", "
                if char == ",":
                    char = yield from _nonspace()
                elif char != end:
                    raise _MalformedError
            self.shut()
            return (yield from _nonspace())
        word = char
        while (char := (yield)) not in ",:]}<" + _SPACE:
            word += char
        self.write(_word(word))
        return char if char not in _SPACE else (yield from _nonspace())

    def read_key(self, char: str) -> _Reader[str]:
        """A string and the colon behind it; returns the first character of the value."""
        if char != '"':
            raise _MalformedError
        if (yield from self.read(char)) != ":":
            raise _MalformedError
        return (yield from _nonspace())

    def _read_string(self) -> _Reader[None]:
        while (char := (yield)) != '"':
            if char != "\\":
                self.say(char)
                continue
            escape = yield
            if escape == "u":
                code = yield from _code()
                if 0xD800 <= code < 0xDC00:  # half of a character, the other must follow
                    yield from _exactly("\\u")
                    low = yield from _code()
                    if not 0xDC00 <= low < 0xE000:
                        raise _MalformedError
                    code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00)
                elif 0xDC00 <= code < 0xE000:
                    raise _MalformedError
                self.say(chr(code))
            elif escape in '"\\/bfnrt':
                self.say(json.loads(f'"\\{escape}"'))
            else:
                raise _MalformedError


def _nonspace() -> _Reader[str]:
    while (char := (yield)) in _SPACE:
        pass
    return char


def _exactly(text: str) -> _Reader[None]:
    for wanted in text:
        if (yield) != wanted:
            raise _MalformedError


def _until(end: str) -> _Reader[str]:
    text = ""
    while (char := (yield)) != end:
        if char in "\n<":
            raise _MalformedError
        text += char
    return text


def _until_end(text: str = "") -> _Reader[None]:
    """Up to </tool_call>; what a broken call has before it is left out."""
    while not text.endswith(_END):
        text = text[-len(_END) :] + (yield)


def _code() -> _Reader[int]:
    digits = ""
    for _ in range(4):
        digits += yield
    try:
        return int(digits, 16)
    except ValueError:
        raise _MalformedError from None


def _value(out: _Raw | _Writer) -> _Reader[None]:
    """What stands between <parameter=...> and </parameter>, without the line breaks next to them."""
    ends = ("\n</parameter>", "</parameter>")
    held, first = "", True
    while True:
        held += yield
        if first and held == "\n":
            held, first = "", False
            continue
        first = False
        while held and not any(end.startswith(held) for end in ends):
            out.say(held[0])
            held = held[1:]
        if held in ends:
            return


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _loaded(text: str) -> Any:
    """JSON, without what only Python takes for it; ValueError."""
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(number)
    return value


def _unquoted(text: str) -> str:
    """Arguments that are JSON within a string, and null for none, as the object they mean."""
    try:
        value = _loaded(text)
        if isinstance(value, str):
            value = _loaded(value)
        return "{}" if value is None else _dumped(value)
    except (ValueError, RecursionError):
        return text


def _word(word: str) -> str:
    """A number or a name; Python's names are JSON's."""
    word = _PYTHON.get(word, word)
    try:
        _loaded(word)
    except ValueError:
        raise _MalformedError from None
    return word


def _parameters(tools: Sequence[Mapping[str, Any]], name: str | None) -> Mapping[str, Any]:
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and function.get("name") == name:
            parameters = function.get("parameters")
            if isinstance(parameters, Mapping) and isinstance(parameters.get("properties", {}), Mapping):
                return parameters
    return {}


def _types(schema: Any, root: Mapping[str, Any], depth: int = 0) -> set[str]:
    """JSON types a schema allows; none when it does not say."""
    if not isinstance(schema, Mapping) or depth > 8:
        return set()
    stated = schema.get("type")
    found = {name for name in _listed([stated] if isinstance(stated, str) else stated) if name in _JSON_TYPES}
    if not found:
        values = [*_listed(schema.get("enum")), *([schema["const"]] if "const" in schema else [])]
        found = {name for name, kinds in _JSON_TYPES.items() if any(type(value) in kinds for value in values)}
    for branch in ("anyOf", "oneOf", "allOf"):
        for each in _listed(schema.get(branch)):
            found |= _types(each, root, depth + 1)
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = root
        for step in reference[2:].split("/"):
            target = target.get(step) if isinstance(target, Mapping) else None
        found |= _types(target, root, depth + 1)
    return found


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else ()


def _typed(text: str, types: Iterable[str]) -> Any:
    """A value as one of the types; text that is none of them stays a string."""
    word = text.strip()
    try:
        value = _loaded(_PYTHON.get(word, word))
    except (ValueError, RecursionError):
        return text
    if isinstance(value, float) and value.is_integer() and "number" not in types:
        value = int(value)
    allowed = tuple(kind for name in types for kind in _JSON_TYPES[name])
    return value if type(value) in allowed else text
