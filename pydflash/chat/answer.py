"""An answer as it streams: thinking, content, and tool calls in OpenAI's shape.

Owns what becomes of <think>, </think> and <tool_call> in a model's text. Gives every piece as soon as it is sure what
it is; how the text was cut into pieces makes no difference to what they add up to.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydflash.chat._calls import CallReader

_THINK, _END_THINK, _CALL = "<think>", "</think>", "<tool_call>"


@dataclass(frozen=True)
class AnswerDelta:
    """What one piece of text adds.

    tool_calls: OpenAI's deltas. The first of a call is {"index", "id", "type", "function": {"name", "arguments"}}, the
        later ones are {"index", "function": {"arguments"}}; the arguments of one index, joined, are JSON.
    """

    reasoning: str = ""
    content: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)

    def __add__(self, other: AnswerDelta) -> AnswerDelta:
        return AnswerDelta(
            self.reasoning + other.reasoning, self.content + other.content, self.tool_calls + other.tool_calls
        )


class AnswerStream:
    """Splits the text of an answer.

    thinking_open: the prompt ended inside <think> (`ChatTemplate.thinking_open`), so the text begins with thinking.
        Otherwise thinking is what the model puts in <think>...</think> before it says anything else.
    tools: the tools the model was given, OpenAI's definitions; <tool_call> means a call only if there are any.

    White space around thinking and before a call is left out; all other content is as the model wrote it. What begins
    like a call and is none is content. A call that is cut (`finish`), or goes wrong after its name, still has arguments
    that are JSON: strings end where they were cut, other values that did not end are left out with their key, lists
    and objects are closed.

    reasoning, content: all that was given so far.
    """

    def __init__(self, *, thinking_open: bool = False, tools: Sequence[Mapping[str, Any]] | None = None) -> None:
        self._tools = tools or ()
        self._held = ""
        self._step: Callable[[], bool] = self._think if thinking_open else self._begin
        self._after_thinking = False
        self._reader: CallReader | None = None
        self._new = True  # the present call was not given out yet
        self._raw: list[str] = []  # a call's text as it was written, as long as it may turn out to be none
        self._delta = AnswerDelta()
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[tuple[str, str, list[str]]] = []  # id, name, arguments

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    @property
    def content(self) -> str:
        return "".join(self._content)

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """The calls so far, OpenAI's: {"id", "type": "function", "function": {"name", "arguments"}}, arguments JSON."""
        return [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": "".join(pieces)}}
            for call_id, name, pieces in self._calls
        ]

    def push(self, text: str) -> AnswerDelta:
        """What more text adds."""
        self._held += text
        return self._run()

    def finish(self, *, cut: bool = False) -> AnswerDelta:
        """What was held back, once nothing follows.

        cut: the model had not ended its answer; the beginning of a call that has no name yet is then left out.
        """
        delta = self._run()
        held, self._held = self._held, ""
        if self._reader is not None:
            if self._reader.name is not None:
                self._reader.close()
                self._call_grew(self._reader)
            elif not cut:
                self._say("".join(self._raw))
        elif self._step == self._think:
            self._reason(held.rstrip())
        elif self._step == self._begin:
            self._say(held.lstrip() if self._after_thinking else held)
        elif held.strip() or not self._calls:
            self._say(held)
        self._step, self._reader = self._end, None
        return delta + self._taken()

    def message(self) -> dict[str, Any]:
        """The answer as a message of the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self._reasoning:
            message["reasoning_content"] = self.reasoning
        if self._calls:
            message["tool_calls"] = self.tool_calls
        return message

    def _run(self) -> AnswerDelta:
        while self._held and self._step():
            pass
        return self._taken()

    def _taken(self) -> AnswerDelta:
        delta, self._delta = self._delta, AnswerDelta()
        return delta

    # Each step takes what it can from the held text; True if another may take more.

    def _begin(self) -> bool:
        """Nothing was said yet: thinking may come."""
        text = self._held.lstrip()
        if text.startswith(_THINK):
            self._held, self._step = text[len(_THINK) :], self._think
            return True
        if _THINK.startswith(text):  # or nothing but white space so far
            return False
        if self._after_thinking:
            self._held = text
        self._step = self._speak
        return True

    def _think(self) -> bool:
        if not self._reasoning:
            self._held = self._held.lstrip()
            if self._held.startswith(_THINK):  # though it is open
                self._held = self._held[len(_THINK) :]
                return True
            if _THINK.startswith(self._held):
                return False
        end = self._held.find(_END_THINK)
        if end >= 0:
            self._reason(self._held[:end].rstrip())
            self._held = self._held[end + len(_END_THINK) :]
            self._step, self._after_thinking = self._begin, True
            return True
        text = _sure(self._held, _END_THINK)
        self._reason(text)
        self._held = self._held[len(text) :]
        return False

    def _speak(self) -> bool:
        if not self._tools:
            self._say(self._held)
            self._held = ""
            return False
        start = self._held.find(_CALL)
        if start >= 0:
            text = self._held[:start].rstrip()
            self._say(text)
            self._raw = [self._held[len(text) : start + len(_CALL)]]
            self._held = self._held[start + len(_CALL) :]
            self._reader, self._new, self._step = CallReader(self._tools), True, self._call
            return True
        text = _sure(self._held, _CALL)
        self._say(text)
        self._held = self._held[len(text) :]
        return False

    def _call(self) -> bool:
        reader = self._reader
        assert reader is not None
        n = reader.push(self._held)
        if self._new:
            self._raw.append(self._held[:n])
        self._held = self._held[n:]
        if reader.failed:
            # The tag was just text; what follows it may hold another.
            raw = "".join(self._raw)
            tag_end = raw.index(_CALL) + len(_CALL)
            self._say(raw[:tag_end])
            self._held = raw[tag_end:] + self._held
        else:
            self._call_grew(reader)
        if reader.failed or reader.done:
            self._reader, self._step = None, self._speak
        return True

    def _end(self) -> bool:
        self._held = ""
        return False

    # What is given out.

    def _reason(self, text: str) -> None:
        if text:
            self._reasoning.append(text)
            self._delta += AnswerDelta(reasoning=text)

    def _say(self, text: str) -> None:
        if text:
            self._content.append(text)
            self._delta += AnswerDelta(content=text)

    def _call_grew(self, reader: CallReader) -> None:
        if reader.name is None:
            return
        text = reader.take()
        if self._new:
            self._new = False
            call_id = f"call_{uuid.uuid4().hex}"
            function = {"name": reader.name, "arguments": text}
            delta = {"index": len(self._calls), "id": call_id, "type": "function", "function": function}
            self._calls.append((call_id, reader.name, [text]))
        elif text:
            delta = {"index": len(self._calls) - 1, "function": {"arguments": text}}
            self._calls[-1][2].append(text)
        else:
            return
        self._delta += AnswerDelta(tool_calls=[delta])


def _sure(text: str, tag: str) -> str:
    """The text without the end that may become the tag, and without white space before that."""
    for n in range(min(len(tag) - 1, len(text)), 0, -1):
        if tag.startswith(text[-n:]):
            text = text[:-n]
            break
    return text.rstrip()
