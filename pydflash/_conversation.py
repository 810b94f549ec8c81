"""What a timeline of tokens means: tokens as they were given, then messages in the model's chat template.

Owns the turning of messages into tokens, and what is left of the messages when the timeline goes back. Knows nothing
of the core.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydflash.errors import ArgumentError, UnsupportedModelError
from pydflash.results import output_hash
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
    """raw: tokens before the first message. messages: OpenAI's. turns: where calls ended: a digest of all tokens then,
    and how many messages there were."""

    tokenizer: Tokenizer | None = field(repr=False)
    raw: list[int] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    turns: list[tuple[str, int]] = field(default_factory=list)

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

    def say(self, messages: Sequence[Message], raw: Sequence[int], ids: Sequence[int]) -> None:
        """A call has ended: these messages behind raw tokens, and these tokens on the timeline."""
        self.messages, self.raw = list(messages), list(raw)
        self.turns = [*self.turns[-999:], (output_hash(ids), len(self.messages))]

    def replace_messages(self, messages: Sequence[Message]) -> None:
        """Others, of which the timeline knows nothing yet."""
        self.messages, self.turns = list(messages), []

    def back_to(self, ids: Sequence[int]) -> None:
        """The timeline has been cut to these tokens: where a call ended, messages; elsewhere, bare tokens."""
        digest = output_hash(ids)
        for i, (then, n_messages) in enumerate(self.turns):
            if then == digest:
                self.messages, self.turns = self.messages[:n_messages], self.turns[: i + 1]
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
            turns = [(str(digest), operator.index(n_messages)) for digest, n_messages in saved["turns"]]
            messages = checked_messages(saved["messages"]) if saved["messages"] else []
            if raw != list(ids[: len(raw)]):
                raise ValueError("its tokens are not those of the session")
            if not all(0 <= n_messages <= len(messages) for _, n_messages in turns):
                raise ValueError("a turn has more messages than there are")
        except (ArgumentError, KeyError, TypeError, ValueError) as error:
            raise ArgumentError(f"this is no conversation ({type(error).__name__}: {error})") from None
        return Conversation(self.tokenizer, raw, messages, turns)

    def copy(self) -> Conversation:
        """Another one of the same."""
        twin = Conversation(self.tokenizer, list(self.raw), deepcopy(self.messages), list(self.turns))
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
