"""What a timeline of tokens means: tokens as they were given, then messages in the model's chat template.

Owns the turning of messages into tokens, and what is left of the messages when the timeline goes back. Knows nothing
of the core.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydflash.errors import ArgumentError, UnsupportedModelError
from pydflash.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pydflash.chat.template import ChatTemplate

Message = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """Messages as tokens.

    ends: tokens up to and with the end of each turn. thinking_open: the last turn is an answer that has begun to think.
    """

    ids: list[int]
    ends: list[int]
    thinking_open: bool = False


@dataclass
class Conversation:
    """raw: tokens before the first message. messages: OpenAI's. turns: (n_tokens, n_messages) where each call ended."""

    tokenizer: Tokenizer | None = field(repr=False)
    raw: list[int] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    turns: list[tuple[int, int]] = field(default_factory=list)

    @cached_property
    def template(self) -> ChatTemplate:
        """The model's; UnsupportedModelError when it has none."""
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            raise UnsupportedModelError(
                "this model has no chat template: give it text with append() and go on with generate(None)"
            )
        from pydflash.chat.template import ChatTemplate

        return ChatTemplate(self.tokenizer.chat_template, self.tokenizer)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        raw: Sequence[int] = (),
        answer: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """Messages behind raw tokens; answer: with the beginning of the turn that answers them."""
        encoded = self.template.encode(
            messages, tools=tools, add_generation_prompt=answer, thinking=thinking, variables=variables
        )
        ids = [*raw, *encoded]
        assert self.tokenizer is not None
        stop_ids = self.tokenizer.stop_ids
        ends = [len(raw) + i + 1 for i, token_id in enumerate(encoded) if token_id in stop_ids]
        return Rendered(ids, ends, answer and self.template.thinking_open(encoded))

    def freeze(self, ids: Sequence[int]) -> None:
        """All of this was given as tokens."""
        self.raw, self.messages, self.turns = list(ids), [], []

    def turn(self, n_tokens: int) -> None:
        """A call has ended with so many tokens on the timeline."""
        self.turns = [turn for turn in self.turns if turn[0] < n_tokens]
        self.turns.append((n_tokens, len(self.messages)))

    def back_to(self, ids: Sequence[int]) -> None:
        """The timeline has been cut to these tokens: where a call ended, messages; elsewhere, bare tokens."""
        for n_tokens, n_messages in self.turns:
            if n_tokens == len(ids) and n_tokens >= len(self.raw):
                self.messages = self.messages[:n_messages]
                self.turns = [turn for turn in self.turns if turn[0] <= n_tokens]
                return
        self.freeze(ids)

    def as_dict(self) -> dict[str, Any]:
        """For `restore`, as JSON takes it."""
        return {"raw": self.raw, "messages": self.messages, "turns": self.turns}

    def restored(self, saved: Any, ids: Sequence[int]) -> Conversation:
        """Another one with what `as_dict` gave, as it comes back from JSON; None: all of its tokens were given as such.
        ArgumentError for what cannot be."""
        if saved is None:
            return Conversation(self.tokenizer, list(ids))
        try:
            raw = [operator.index(token_id) for token_id in saved["raw"]]
            turns = [(operator.index(n_tokens), operator.index(n_messages)) for n_tokens, n_messages in saved["turns"]]
            messages = checked_messages(saved["messages"]) if saved["messages"] else []
        except (ArgumentError, KeyError, TypeError, ValueError) as error:
            raise ArgumentError(f"this is no conversation ({type(error).__name__}: {error})") from None
        return Conversation(self.tokenizer, raw, messages, turns)

    def copy(self) -> Conversation:
        """Another one of the same."""
        twin = Conversation(self.tokenizer, list(self.raw), list(self.messages), list(self.turns))
        if "template" in self.__dict__:  # which takes longer to make than a short question to answer
            twin.__dict__["template"] = self.template
        return twin


def checked_messages(messages: Any) -> list[Message]:
    """Messages as dicts with a role; ArgumentError for anything else."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ArgumentError(
            f"messages must be a list of {{'role': ..., 'content': ...}}, not {type(messages).__name__}"
        )
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ArgumentError(f"messages[{i}] must be {{'role': ..., 'content': ...}}, not {message!r:.60}")
    if not messages:
        raise ArgumentError("messages is empty: give at least one")
    return [dict(message) for message in messages]
