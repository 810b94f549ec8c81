"""The formats an answer can be held to, compiled: JSON, a JSON schema, a regular expression, Lark, one of a few texts.

`llguidance` does the work. What it refuses, or what is too hard, ends in ArgumentError with its own words and never in
a hang or a crash: compiling has a time limit, and a stack that is deep enough for whatever we let in.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, TypeVar

from pydflash._lib import ffi
from pydflash.errors import ArgumentError, OutOfMemoryError, UnsupportedModelError, nearest
from pydflash.tokenizer import Tokenizer

T = TypeVar("T")

TIME_LIMIT = 10.0  # seconds that compiling may take
# What compiling takes grows with the square of these, in time and in memory, and nothing can stop it on the way.
_MAX_TEXT = {"regex": 8 << 10, "lark": 32 << 10, "choice": 4 << 20, "json_schema": 4 << 20, "json_object": 4 << 20}
_MAX_PATTERNS = _MAX_TEXT["regex"]  # characters of all patterns of a schema
_MAX_DIGITS = 5  # of multipleOf
_MAX_PARTS = 10_000
_STACK = 512 << 20  # bytes; llguidance recurs along references, with 10 KiB for each part of a schema on the way
_STACK_LOCK = threading.Lock()

# One line, one space after commas and colons: fewer ways to say the same, so more of it is certain. A schema may change
# these under "x-guidance".
_JSON_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_FORMS = ("json_schema", "regex", "lark", "choice")
_TYPES = ("text", "json_object", *_FORMS)


def compile_format(response_format: Mapping[str, Any], tokenizer: Tokenizer) -> Any:
    """An LLMatcher at the beginning of an answer; None for {"type": "text"}. See `Constraint.compile`."""
    kind, value = _form(response_format)
    if kind == "text":
        return None
    if not tokenizer.stop_ids:
        raise UnsupportedModelError("the model's tokenizer has no end token: an answer in a format could not end")
    text = _source(kind, value)
    vocabulary = _vocabulary(tokenizer)
    return _with_limits(lambda: _compile(kind, text, vocabulary, tokenizer.n_vocab))


def _form(response_format: Mapping[str, Any]) -> tuple[str, Any]:
    """What kind of format it is, and the schema, pattern, grammar or texts."""
    if not isinstance(response_format, Mapping):
        raise ArgumentError(f"response_format is {response_format!r}, not a mapping as {{'type': 'json_object'}}")
    kind = response_format.get("type")
    if kind is None:
        given = [name for name in _FORMS if name in response_format]
        if len(given) != 1 or len(response_format) != 1:
            raise ArgumentError(
                f"response_format has the keys {sorted(map(str, response_format))}; give a type, or one of "
                + ", ".join(_FORMS)
            )
        return given[0], response_format[given[0]]
    if kind not in _TYPES:
        raise ArgumentError(
            f"response_format has the type {kind!r}{nearest(str(kind), _TYPES) or '; known are ' + ', '.join(_TYPES)}"
        )
    if kind in ("text", "json_object"):
        return kind, {"type": "object"}
    if kind not in response_format:
        raise ArgumentError(f"response_format has the type {kind}, but no {kind!r}")
    value = response_format[kind]
    if kind == "json_schema":  # OpenAI's wrapping
        if not isinstance(value, Mapping) or "schema" not in value:
            raise ArgumentError("response_format: json_schema holds no 'schema'")
        value = value["schema"]
    return kind, value


def _source(kind: str, value: Any) -> str:
    """The format in its own language: a schema as JSON, a choice as Lark."""
    if kind in ("json_object", "json_schema"):
        if not isinstance(value, Mapping):
            raise ArgumentError(f"response_format: a JSON schema is an object, not {type(value).__name__}")
        try:
            text = json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ArgumentError(f"response_format: the JSON schema is not JSON: {error}") from None
        _check_schema(value)
    elif kind == "choice":
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise ArgumentError("response_format: choice must be a list of one or more texts")
        if not all(isinstance(item, str) for item in value):
            raise ArgumentError("response_format: choice holds something that is not text")
        # One terminal: as many alternatives of a rule would each be followed by themselves.
        text = "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(item, ensure_ascii=False) for item in value)
    elif isinstance(value, str):
        text = value
    else:
        raise ArgumentError(f"response_format: {kind} must be text, not {type(value).__name__}")
    if len(text) > _MAX_TEXT[kind]:
        raise ArgumentError(
            f"response_format: the {kind} has {len(text)} characters, but {_MAX_TEXT[kind]} at most can be used"
        )
    return text


def _check_schema(schema: Mapping[str, Any]) -> None:
    """Refuses what would take llguidance minutes."""
    n_parts = n_pattern = 0
    parts: list[Any] = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, (list, tuple)):
            parts += part
        elif isinstance(part, Mapping):
            n_parts += 1
            parts += part.values()
            patterns = part.get("patternProperties")
            pattern = part.get("pattern")
            n_pattern += len(pattern) if isinstance(pattern, str) else 0
            n_pattern += sum(len(str(key)) for key in patterns) if isinstance(patterns, Mapping) else 0
            multiple = part.get("multipleOf")
            if isinstance(multiple, (int, float)) and _n_digits(multiple) > _MAX_DIGITS:
                raise ArgumentError(f"response_format: multipleOf {multiple} has more than {_MAX_DIGITS} digits")
    for n, most, what in ((n_parts, _MAX_PARTS, "parts"), (n_pattern, _MAX_PATTERNS, "characters of patterns")):
        if n > most:
            raise ArgumentError(f"response_format: the JSON schema has {n} {what}, but {most} at most can be used")


def _n_digits(number: float) -> int:
    """Digits of the number with its decimal point left out: 3 for 100 and for 1.25."""
    _, digits, exponent = Decimal(repr(+number)).normalize().as_tuple()
    return len(digits) + max(int(exponent), 0)


def _compile(kind: str, text: str, vocabulary: Any, n_vocab: int) -> Any:
    """The compiled grammar, its first mask already made: what is hopeless is so from the start."""
    from llguidance import LLMatcher, LLParserLimits

    try:
        text.encode()
        if kind == "regex":
            grammar = LLMatcher.grammar_from_regex(text)
        elif kind in ("lark", "choice"):
            grammar = LLMatcher.grammar_from_lark(text)
        else:
            grammar = LLMatcher.grammar_from_json_schema(text, defaults=_JSON_OPTIONS)
    except ValueError as error:  # UnicodeEncodeError is one
        raise ArgumentError(f"response_format: {words(str(error))}") from None
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
    if not matcher.is_error():
        fill(matcher, ffi.new("uint32_t[]", mask_bytes(n_vocab) // 4), n_vocab)
    if matcher.is_error():
        raise ArgumentError(f"response_format: {words(matcher.get_error())}")
    return matcher


def fill(matcher: Any, bits: Any, n_vocab: int) -> None:
    """Sets the bits, all 0 before, of the tokens that may come next."""
    matcher.unsafe_compute_mask_ptr(int(ffi.cast("uintptr_t", bits)), mask_bytes(n_vocab))


def mask_bytes(n_vocab: int) -> int:
    """Bytes of a mask: whole words of 32 bits."""
    return 4 * ((n_vocab + 31) // 32)


def words(message: str) -> str:
    """llguidance's message without what it says to itself."""
    return message.partition("\n<non-verbose/>")[0].strip() or "llguidance gives no reason"


def _with_limits(work: Callable[[], T]) -> T:
    """work() on a thread with a stack for what recurs, at most TIME_LIMIT seconds. What takes longer goes on to its end
    in the background: nothing can stop it."""
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:  # a panic of Rust's is a BaseException
            failed.append(error)

    thread = threading.Thread(target=run, name="pydflash-constraint", daemon=True)
    with _STACK_LOCK:
        before = threading.stack_size(_STACK)
        try:
            thread.start()
        except RuntimeError:
            raise OutOfMemoryError(
                f"response_format: there is no room for a thread with a stack of {_STACK >> 20} MiB to compile it on"
            ) from None
        finally:
            threading.stack_size(before)
    thread.join(TIME_LIMIT)
    if done:
        return done[0]
    if not failed:
        raise ArgumentError(f"response_format takes more than {TIME_LIMIT:g} s to compile; make it simpler")
    if isinstance(failed[0], Exception):
        raise failed[0]
    raise ArgumentError(f"response_format: llguidance cannot compile it: {failed[0]}")


# ---- the vocabulary ------------------------------------------------------------------------------------------------

_VOCABULARIES: weakref.WeakKeyDictionary[Tokenizer, Any] = weakref.WeakKeyDictionary()


class _Spelling:
    """A tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = min(tokenizer.stop_ids)
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.n_vocab)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._tokenizer = weakref.ref(tokenizer)  # which keeps us

    def __call__(self, text: str) -> list[int]:
        tokenizer = self._tokenizer()
        return tokenizer.encode(text, add_special=False, parse_special=False) if tokenizer else []


def _vocabulary(tokenizer: Tokenizer) -> Any:
    """The tokenizer as llguidance has it, built once."""
    from llguidance import LLTokenizer, TokenizerWrapper

    if tokenizer not in _VOCABULARIES:
        wrapper = TokenizerWrapper(_Spelling(tokenizer))
        _VOCABULARIES[tokenizer] = LLTokenizer(wrapper, n_vocab=tokenizer.n_vocab, eos_token=sorted(tokenizer.stop_ids))
    return _VOCABULARIES[tokenizer]
