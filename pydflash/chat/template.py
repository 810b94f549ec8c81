"""A conversation into the tokens its model was trained on, by the template in the model's file.

Owns the shapes in which templates want messages, and the rule that text somebody gave stays text: only what the
template itself writes becomes special tokens. Refuses messages that no template could take.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pydflash.chat._engine import Engine, as_value, to_json
from pydflash.chat._marks import Marks
from pydflash.errors import ArgumentError, UnsupportedModelError
from pydflash.tokenizer import Tokenizer

Message = Mapping[str, Any]
_MAX_DEPTH = 64
_TAIL = 16  # tokens; more than any "<think>" and the white space behind it


class ChatTemplate:
    """A chat template of a model, in Jinja as Hugging Face renders it.

    source: the template, as `Tokenizer.chat_template` has it.
    tokenizer: that of the same file.

    Raises UnsupportedModelError for a template that cannot be read.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self._where = f"{tokenizer.source}: the chat template"
        self._tokenizer = tokenizer
        self._engine = Engine(source, where=self._where)
        self._marks = Marks(tokenizer.special, source)
        self._marked_engine: Engine | None = None
        self._names = {
            name: tokenizer.decode([token_id])
            for name, token_id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
            if token_id is not None
        }

    @property
    def variables(self) -> frozenset[str]:
        """Names the template reads: "messages", "tools", "enable_thinking", and whatever else it may be told."""
        return self._engine.variables

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        thinking: bool | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text.

        messages: OpenAI's, {"role", "content", "reasoning_content"?, "tool_calls"?, "tool_call_id"?}; content is a
            string or a list of text parts, a tool call's arguments JSON or a dict.
        tools: OpenAI's tool definitions.
        add_generation_prompt: end with the beginning of the assistant's answer.
        thinking: True or False switches thinking in templates that have such a switch ("enable_thinking" or
            "thinking"); None leaves it as the template has it.
        variables: more names for the template ("documents", "preserve_thinking").

        Raises ArgumentError for messages the template refuses, with its own words, or cannot render;
        UnsupportedModelError for a template that cannot be run.
        """
        given = self._given(messages, tools, add_generation_prompt, thinking, variables)
        return self._render(given)[0]

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        thinking: bool | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The conversation as token ids; takes what `render` takes, and decodes to what that gives.

        Special tokens are those the template writes. Their spellings in anything given (content of any role, tool
        results, tools, arguments) are plain text.
        """
        given = self._given(messages, tools, add_generation_prompt, thinking, variables)
        text, shaped = self._render(given)
        ids: list[int] = []
        marked = self._marked(text, shaped)
        # The pattern is one group, so plain text and special tokens take turns, plain text first.
        for index, piece in enumerate(self._marks.pattern.split(marked) if self._marks.pattern else [marked]):
            if index % 2:
                ids.append(self._tokenizer.special[piece])
            elif piece:
                ids += self._tokenizer.encode(self._marks.off(piece), add_special=False, parse_special=False)
        return ids

    def thinking_open(self, ids: Sequence[int]) -> bool:
        """Whether a prompt ends inside <think>, so that what the model says first is thinking."""
        return self._tokenizer.decode(ids[-_TAIL:]).rstrip().endswith("<think>")

    def _given(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        thinking: bool | None,
        variables: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """Everything the template may see, copied and checked."""
        _check_list(messages, "messages", "a list of {'role': ..., 'content': ...}")
        _check_list(tools or [], "tools", "a list of {'type': 'function', 'function': {...}}")
        for i, message in enumerate(messages):
            if not isinstance(message.get("role"), str):
                raise ArgumentError(f"messages[{i}] has no 'role'; it is 'system', 'user', 'assistant' or 'tool'")
            if message["role"] in ("system", "user", "tool") and message.get("content") is None:
                raise ArgumentError(f"messages[{i}], of role {message['role']!r}, has no 'content'")
        if tools and "tools" not in self._engine.variables:
            raise ArgumentError(f"{self._where} takes no tools; this model was not made to call any")
        switch = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
        more = dict(variables or {})
        for name in more:
            if name in ("messages", "tools", "add_generation_prompt"):
                raise ArgumentError(f"variables holds {name!r}, which is an argument of its own")
        return {
            **self._names,
            "documents": None,
            **switch,
            **_copied(more, "variables"),
            "messages": _copied(list(messages), "messages"),
            "tools": _copied(list(tools), "tools") if tools else None,
            "add_generation_prompt": bool(add_generation_prompt),
        }

    def _render(self, given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The text, and what was given in the shape the template could use."""
        refused: Exception | None = None
        spilt: tuple[str, dict[str, Any]] | None = None
        for messages in _shapes(given["messages"]):
            shaped = {**given, "messages": messages}
            try:
                text = self._engine.render(_mapped(shaped, str), n_values=_count(shaped))  # it may change its copy
            except ArgumentError as error:
                refused = refused or error
                continue
            if not _spills(text, messages):
                return text, shaped
            spilt = spilt or (text, shaped)
        if spilt is not None:
            return spilt
        assert refused is not None  # there is always a shape
        raise refused

    def _marked(self, text: str, shaped: dict[str, Any]) -> str:
        """The text with stand-ins in whatever the template was given."""
        strings = [*_strings(shaped)]
        if not any(map(self._marks.touches, strings)):
            return text
        if self._marks.avoid(strings) or self._marked_engine is None:
            self._marked_engine = self._marks.engine(self._where)
        n_values = _count(shaped)
        # What an assistant said is a model's own markup where a template insists on reading it.
        for trusted, engine in itertools.product(("", "assistant"), (self._marked_engine, self._engine)):
            try:
                marked = engine.render(self._with_marks(shaped, trusted), n_values=n_values)
            except (ArgumentError, UnsupportedModelError):
                continue
            if self._marks.off(marked) == text:
                return marked
        raise ArgumentError(
            f"{self._where} reads markup in these messages as its own, so it cannot be kept apart as text; "
            f"leave spellings such as {self._marks.known[0]!r} out of them"
        )

    def _with_marks(self, shaped: dict[str, Any], trusted: str) -> dict[str, Any]:
        def message(given: dict[str, Any]) -> dict[str, Any]:
            if given["role"] == trusted:
                return given
            return {**_mapped(given, self._marks.on), "role": self._marks.on_name(given["role"])}

        return {
            name: [message(item) for item in value]
            if name == "messages"
            else value
            if name in self._names
            else _mapped(value, self._marks.on)
            for name, value in shaped.items()
        }


def _check_list(value: object, name: str, wanted: str) -> None:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        raise ArgumentError(f"{name} is {type(value).__name__}, not {wanted}")
    for i, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise ArgumentError(f"{name}[{i}] is {type(item).__name__}; {name} is {wanted}")


def _copied(value: Any, path: str, depth: int = 0) -> Any:
    """A copy of what JSON can say, which is all a template gets."""
    if depth > _MAX_DEPTH:
        raise ArgumentError(f"{path[:60]}... is nested more than {_MAX_DEPTH} deep")
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ArgumentError(
                f"{path} cannot be UTF-8: character {error.start} is the lone surrogate {value[error.start]!r}"
            ) from None
        return str(value)
    if isinstance(value, float):
        return as_value(value)
    if isinstance(value, Mapping):
        bad = next((key for key in value if not isinstance(key, str)), None)
        if bad is not None:
            raise ArgumentError(f"{path} has the key {bad!r}; keys are strings")
        return {_copied(k, path): _copied(item, f"{path}[{k!r}]", depth + 1) for k, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise ArgumentError(f"{path} is {type(value).__name__}; messages are made of what JSON can say")


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    return value


def _count(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + sum(map(_count, value.values()))
    return 1 + sum(map(_count, value)) if isinstance(value, list) else 1


def _strings(value: Any) -> Iterator[str]:
    """Every string in a value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _shapes(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The messages as templates may want them: arguments of tool calls as objects or as JSON, and, where a template
    takes strings only, the parts of a content in one."""
    objects = [_with_arguments(message, _as_object) for message in messages]
    texts = [_with_arguments(message, _as_json) for message in messages]
    shapes = [objects, texts] if texts != objects else [objects]
    yield from shapes
    if any(_is_text_parts(message.get("content")) for message in messages):
        for shape in shapes:
            yield [_with_one_text(message) for message in shape]


def _with_arguments(message: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_call_with_arguments(call, change) for call in calls]}


def _call_with_arguments(call: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        return {**call, "function": _call_with_arguments(call["function"], change)}
    if isinstance(call, dict) and "arguments" in call:
        return {**call, "arguments": change(call["arguments"])}
    return call


def _as_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return _copied(parsed, "arguments") if isinstance(parsed, dict) else arguments


def _as_json(arguments: Any) -> Any:
    return to_json(arguments) if isinstance(arguments, dict) else arguments


def _is_text_parts(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content)


def _with_one_text(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not _is_text_parts(content):
        return message
    return {**message, "content": "\n".join(str(part["text"]) for part in content or ())}


def _spills(text: str, messages: list[dict[str, Any]]) -> bool:
    """Whether a list or dict came out as Python writes it: the template took it for a string."""
    for message in messages:
        content, calls = message.get("content"), message.get("tool_calls")
        if isinstance(content, list) and content and repr(content)[:24] in text:
            return True
        for call in calls if isinstance(calls, list) else ():
            call = call.get("function", call) if isinstance(call, dict) else {}
            arguments = call.get("arguments") if isinstance(call, dict) else None
            if isinstance(arguments, dict) and arguments and f"{{{next(iter(arguments))!r}: " in text:
                return True
    return False
