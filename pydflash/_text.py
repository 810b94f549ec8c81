"""Tokens into text as they come, and where a stop string ends it.

Holds back incomplete characters and whatever may be the beginning of a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydflash.tokenizer import Tokenizer


class TextStream:
    """The text of one run. Without a tokenizer all text is empty."""

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str] = ()) -> None:
        self._n_vocab = tokenizer.n_vocab if tokenizer else 0
        self._decoder = tokenizer.stream_decoder(skip_special=True) if tokenizer else None
        self._stops = tuple(stops)
        self._held = ""

    def push(self, ids: Sequence[int]) -> tuple[str, int | None]:
        """The text that can be given out after these tokens, and, if a stop string completes, how many of them that
        takes (None otherwise). After a stop there is nothing more to come."""
        for i, token_id in enumerate(ids):
            if self._decoder is None or token_id >= self._n_vocab:  # a target may have more rows than its vocabulary
                continue
            self._held += self._decoder.push(token_id)
            cut = self._find_stop() if self._stops else None
            if cut is not None:
                text, self._held = self._held[:cut], ""
                return text, i + 1
        return self._release(self._n_undecided() if self._stops else 0), None

    def finish(self) -> str:
        """The rest, once it is known that nothing follows."""
        if self._decoder is not None:
            self._held += self._decoder.flush()
        return self._release(0)

    def _find_stop(self) -> int | None:
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        return min(found) if found else None

    def _n_undecided(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = min(max(map(len, self._stops), default=0) - 1, len(self._held))
        for n in range(longest, 0, -1):
            tail = self._held[-n:]
            if any(stop.startswith(tail) for stop in self._stops):
                return n
        return 0

    def _release(self, n_keep: int) -> str:
        edge = len(self._held) - n_keep
        text, self._held = self._held[:edge], self._held[edge:]
        return text
