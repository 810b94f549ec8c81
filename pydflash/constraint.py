"""An answer held to a format, step by step: the three functions that the core asks, on a grammar of llguidance's.

What formats there are and how they are compiled is in `_grammar`. A step's work is bounded by llguidance's own limits:
a grammar that becomes too hard on the way ends the run with ArgumentError, in llguidance's words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from pydflash._grammar import compile_format, fill, mask_bytes, words
from pydflash._lib import check, ffi, lib
from pydflash.errors import ArgumentError
from pydflash.tokenizer import Tokenizer


class Constraint:
    """One run under a grammar: compile it, `attach` it to the session, `commit` what each step kept. Used once.

    stop_ids: the tokens that end an answer; the run must end at them. They may come where the grammar is complete, and
        nothing else may when it can go no further.
    """

    def __init__(self, matcher: Any, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._matcher = matcher
        self._after = list(after)
        self._n_before = 0  # tokens of `after` that stand; the grammar begins when all of them do
        self._n_vocab = tokenizer.n_vocab
        self._carried: list[int] = []  # certain tokens, still to come
        self._lines: dict[tuple[int, ...], list[int]] = {}  # of this step's paths
        self._ended = False
        self._stop_bits = sum(1 << token for token in tokenizer.stop_ids)
        self._any_bits = (1 << tokenizer.n_vocab) - 1 - self._stop_bits
        self._error: BaseException | None = None
        self.stop_ids = tokenizer.stop_ids
        self._handle = ffi.new_handle(self)
        self._struct = ffi.new(
            "pf_constraint *",
            {
                "size": ffi.sizeof("pf_constraint"),
                "n_vocab": tokenizer.n_vocab,
                "user": self._handle,
                "mask": lib.pf_python_mask,
                "allowed": lib.pf_python_allowed,
                "forced": lib.pf_python_forced,
            },
        )

    @classmethod
    def compile(
        cls, response_format: Mapping[str, Any], tokenizer: Tokenizer, *, after: str | None = None
    ) -> Constraint | None:
        """The constraint that a response format stands for; None for {"type": "text"}, which is none.

        response_format: {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": {...}}}, or in short
            {"json_schema": {...}} (the schema itself), {"regex": "..."} (for the whole answer), {"lark": "..."} (a
            grammar in llguidance's kind of Lark), {"choice": ["...", ...]}.
        after: text that the grammar begins behind, as "</think>\\n\\n". Until its first token is said everything may be
            but an end; then comes the rest of it.

        The first call with a tokenizer prepares it: a second for a vocabulary of 248,320 tokens.

        Raises ArgumentError for what is not a response format, for a grammar that llguidance refuses, in its own words,
        for one that is larger than can be compiled in reason, and for one that takes more than 10 seconds: llguidance
        then goes on to its end in the background. UnsupportedModelError when the tokenizer names no end token.
        OutOfMemoryError when there is no room for the 512 MiB of addresses that compiling may recur in.
        """
        matcher = compile_format(response_format, tokenizer)
        if matcher is None:
            return None
        return cls(matcher, tokenizer, tokenizer.encode(after, add_special=False) if after else [])

    def attach(self) -> Any:
        """The struct for `pf_session_constrain`. Keep this object until another constraint, or none, is set."""
        return self._struct

    def commit(self, tokens: Sequence[int]) -> None:
        """The timeline grew by these, the step's tokens that were kept."""
        self._ended = bool(tokens) and tokens[-1] in self.stop_ids
        path = tuple(tokens[:-1] if self._ended else tokens)
        self._carried = self._line(path)
        self._lines = {}
        self._n_before, rest = self._split(path)
        if not self._matcher.consume_tokens(rest):
            raise self._failure()

    def check(self, status: int) -> None:
        """As `_lib.check`, for the status of a step: raises what a function of ours raised in it, if one did."""
        error, self._error = self._error, None
        if error is not None:
            raise error
        check(status)

    @property
    def complete(self) -> bool:
        """Whether the answer could end here."""
        return self._n_before == len(self._after) and bool(self._matcher.is_accepting())

    # ---- what the core asks; a path is the tokens behind the pending one -------------------------------------------

    def _split(self, path: Sequence[int]) -> tuple[int, list[int]]:
        """How many tokens of `after` stand at the end of a path, and the part of it behind those, the grammar's."""
        stage = self._n_before
        for i, token in enumerate(path):
            if stage == len(self._after):
                return stage, list(path[i:])
            stage = stage + 1 if stage or token == self._after[0] else 0
        return stage, []

    @contextmanager
    def _at(self, rest: list[int]) -> Iterator[Any]:
        """The matcher, so many tokens on."""
        if not self._matcher.consume_tokens(rest):
            raise self._failure()
        yield self._matcher
        if self._matcher.is_error() or not self._matcher.rollback(len(rest)):
            raise self._failure()

    def _line(self, path: tuple[int, ...]) -> list[int]:
        """The tokens that are certain after a path; empty where there is a choice.

        Where the grammar leaves one text, llguidance leaves one spelling of it. It is asked once for each such text, so
        that the spelling does not depend on the steps in which it is said.
        """
        if path not in self._lines:
            line = self._line(path[:-1])[1:] if path else self._carried
            stage, rest = self._split(path)
            if not line and stage == len(self._after):
                with self._at(rest) as matcher:
                    line = matcher.compute_ff_tokens()
            elif not line and stage > 0:
                line = self._after[stage:]
            self._lines[path] = line
        return self._lines[path]

    def _is_free(self, path: tuple[int, ...]) -> bool:
        return self._split(path)[0] == 0 < len(self._after)

    def _has_ended(self, path: tuple[int, ...]) -> bool:
        return self._ended or not self.stop_ids.isdisjoint(path)

    def _mask(self, path: tuple[int, ...], bits: Any) -> None:
        if self._has_ended(path):
            mask = self._stop_bits
        elif self._is_free(path):
            mask = self._any_bits
        elif line := self._line(path):
            mask = 1 << line[0]
        else:
            with self._at(self._split(path)[1]) as matcher:
                fill(matcher, bits, self._n_vocab)
            return
        n_bytes = mask_bytes(self._n_vocab)
        ffi.memmove(bits, mask.to_bytes(n_bytes, "little"), n_bytes)

    def _allowed(self, path: tuple[int, ...], token: int) -> bool:
        if self._has_ended(path):
            return False
        if self._is_free(path):
            return token not in self.stop_ids
        if line := self._line(path):
            return token == line[0]
        with self._at(self._split(path)[1]) as matcher:
            # A matcher that can go no further knows its end, but does not take an end token.
            return bool(matcher.is_accepting() if token in self.stop_ids else matcher.validate_tokens([token]))

    def _forced(self) -> list[int]:
        return [] if self._ended else self._line(())

    def _failure(self) -> ArgumentError:
        return ArgumentError(f"response_format can go no further: {words(self._matcher.get_error())}")


# ---- the functions behind pf_constraint ----------------------------------------------------------------------------


def _keep(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An exception cannot cross C: the constraint keeps it, C sees -1."""
    if trace is not None:
        ffi.from_handle(trace.tb_frame.f_locals["user"])._error = error


@ffi.def_extern(name="pf_python_mask", error=-1, onerror=_keep)  # type: ignore[untyped-decorator]
def _python_mask(user: Any, path: Any, n: int, bits: Any) -> int:
    self: Constraint = ffi.from_handle(user)
    self._mask(tuple(ffi.unpack(path, n)) if n else (), bits)
    return 0


@ffi.def_extern(name="pf_python_allowed", error=-1, onerror=_keep)  # type: ignore[untyped-decorator]
def _python_allowed(user: Any, path: Any, n: int) -> int:
    self: Constraint = ffi.from_handle(user)
    *before, token = ffi.unpack(path, n)
    return int(self._allowed(tuple(before), token))


@ffi.def_extern(name="pf_python_forced", error=-1, onerror=_keep)  # type: ignore[untyped-decorator]
def _python_forced(user: Any, out: Any, most: int) -> int:
    self: Constraint = ffi.from_handle(user)
    forced = self._forced()[:most]
    out[0 : len(forced)] = forced
    return len(forced)
