"""Answers are split into thinking, content and tool calls; calls are read back from what Qwen's own templates write."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydflash._text import TextStream
from pydflash.chat import AnswerDelta, AnswerStream
from pydflash.tokenizer import _BYTE_OF, Tokenizer
from tests.chat_templates import FILES, assistant, call, function, hugging_face, user

TOOLS = [
    function(
        "look",
        "",
        text={"type": "string"},
        count={"type": "integer"},
        ratio={"type": "number"},
        flag={"type": "boolean"},
        items={"type": "array", "items": {}},
        more={"type": "object"},
        maybe={"anyOf": [{"$ref": "#/properties/more"}, {"type": "null"}]},
        choice={"enum": ["a", 1]},
    )
]
TEMPLATES = {name: hugging_face().from_string(FILES[name]) for name in ("qwen3", "qwen3.5", "qwen3.6", "qwen3-coder")}


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def streamed(
    pieces: list[str], *, cut: bool = False, **options: Any
) -> tuple[str, str, list[tuple[str | None, str]], AnswerStream]:
    """Everything the deltas add up to, each call as name and arguments."""
    stream = AnswerStream(**options)
    calls: list[tuple[str | None, str]] = []
    total = AnswerDelta()
    for delta in [*map(stream.push, pieces), stream.finish(cut=cut)]:
        total += delta
    for each in total.tool_calls:
        if each["index"] == len(calls):
            assert each["type"] == "function"
            assert each["id"]
            calls.append((each["function"]["name"], ""))
        name, arguments = calls[each["index"]]
        calls[each["index"]] = (name, arguments + each["function"]["arguments"])
    assert total.reasoning == stream.reasoning
    assert total.content == stream.content
    assert calls == [(c["function"]["name"], c["function"]["arguments"]) for c in stream.tool_calls]
    return total.reasoning, total.content, calls, stream


@pytest.mark.parametrize(
    ("text", "open_", "reasoning", "content"),
    [
        ("Hi.\n", False, "", "Hi.\n"),
        ("\nhm\n</think>\n\nHi.", True, "hm", "Hi."),
        ("<think>\nhm\n</think>\n\nHi.", True, "hm", "Hi."),
        ("<think>\nhm\n</think>\n\nHi.", False, "hm", "Hi."),
        ("\n <think></think>Hi.", False, "", "Hi."),
        ("cut in the mid", True, "cut in the mid", ""),
        ("hm </thin", True, "hm </thin", ""),
        ("<think>a</think><think>b</think>c", False, "ab", "c"),
        ("Say <think> and </think>.", False, "", "Say <think> and </think>."),
        ("  x", False, "", "  x"),
        ("<thin", False, "", "<thin"),
        ("\n\n", True, "", ""),
        ("<tool_call>\n</tool_call>", False, "", "<tool_call>\n</tool_call>"),
    ],
)
def test_thinking_is_split_from_the_answer(text: str, open_: bool, reasoning: str, content: str) -> None:
    for pieces in ([text], list(text)):
        assert streamed(pieces, thinking_open=open_)[:3] == (reasoning, content, [])


def test_nothing_is_held_back_longer_than_it_must() -> None:
    stream = AnswerStream(thinking_open=True, tools=TOOLS)
    assert stream.push("\nhm").reasoning == "hm"
    assert stream.push(" </thi").reasoning == ""
    assert stream.push("s").reasoning == " </this"
    assert stream.push("</think>\n").reasoning == ""
    assert stream.push("Yes <too").content == "Yes"
    assert stream.push("ls>").content == " <tools>"
    first = stream.push('<tool_call>\n{"name": "look", "arguments": {"text": "ab').tool_calls
    assert [each["function"] for each in first] == [{"name": "look", "arguments": '{"text": "ab'}]
    assert stream.push("c").tool_calls == [{"index": 0, "function": {"arguments": "c"}}]
    assert stream.push("\\u00").tool_calls == []
    assert stream.push("e9").tool_calls == [{"index": 0, "function": {"arguments": "é"}}]


@pytest.mark.parametrize("kind", [3, 4])  # control tokens or user-defined ones, as files have it
def test_tags_reach_the_stream_as_text(kind: int) -> None:
    tags = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_end|>"]
    vocabulary = Tokenizer([*_BYTE_OF, *tags], [], pre="qwen2", token_types=[1] * 256 + [kind] * 4 + [3])
    ids = vocabulary.encode('<think>hm</think>Yes.<tool_call>{"name": "look", "arguments": {}}</tool_call><|im_end|>')
    assert [i for i in ids if i >= 256] == [256, 257, 258, 259, 260]
    text = TextStream(vocabulary)
    pieces = [text.push([i])[0] for i in ids]
    assert streamed([*pieces, text.finish()], tools=TOOLS)[:3] == ("hm", "Yes.", [("look", "{}")])


# What a model may write, read back from the templates it was trained with.

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
typed = st.fixed_dictionaries(
    {},
    optional={
        "text": st.text().filter(lambda text: "</parameter>" not in text),
        "count": st.integers(),
        "ratio": st.floats(allow_nan=False, allow_infinity=False),
        "flag": st.booleans(),
        "items": st.lists(json_values, max_size=3),
        "more": st.dictionaries(st.text(max_size=4), json_values, max_size=3),
        "maybe": st.none() | st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
        "choice": st.sampled_from(["a", 1]),
    },
)
said = st.text("abc <>\n", max_size=10).map(lambda text: text.strip())


def written(name: str, content: str, arguments: list[dict[str, Any]]) -> str:
    """What the model would have written for a turn to look like this."""
    calls = [call("look", each) for each in arguments]
    text = TEMPLATES[name].render(messages=[user("q"), assistant(content, tool_calls=calls)], tools=TOOLS)
    return text[: text.rindex("<|im_end|>")].rpartition("<|im_start|>assistant\n")[2]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), content=said, cuts=st.lists(st.integers(0, 2000), max_size=6))
def test_reads_what_templates_write(name: str, data: st.DataObject, content: str, cuts: list[int]) -> None:
    arguments = data.draw(st.lists(json_objects if name == "qwen3" else typed, min_size=1, max_size=2))
    text = written(name, content, arguments)
    calls, stream = streamed(pieces_of(text, cuts), tools=TOOLS)[2:]
    assert stream.content.strip() == content
    assert [(called, json.loads(got)) for called, got in calls] == [("look", each) for each in arguments]
    if name != "qwen3-coder":
        # Put into the history, the message is what was written.
        again = [(json.loads(each["function"]["arguments"])) for each in stream.message()["tool_calls"]]
        assert written(name, stream.message()["content"], again) == text


json_objects = st.dictionaries(st.text(max_size=4), json_values, max_size=3)


def is_beginning(part: Any, whole: Any) -> bool:
    if isinstance(whole, str) and isinstance(part, str):
        return whole.startswith(part)
    if isinstance(whole, list) and isinstance(part, list):
        return len(part) <= len(whole) and all(is_beginning(a, b) for a, b in zip(part, whole, strict=False))
    if isinstance(whole, dict) and isinstance(part, dict):
        return all(key in whole and is_beginning(value, whole[key]) for key, value in part.items())
    return part == whole and type(part) is type(whole)


@pytest.mark.parametrize("name", ["qwen3", "qwen3.5"])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), end=st.integers(0, 500))
def test_a_cut_call_still_has_json_arguments(name: str, data: st.DataObject, end: int) -> None:
    arguments = data.draw(st.lists(json_objects if name == "qwen3" else typed, min_size=1, max_size=2))
    text = written(name, "", arguments)
    _, content, calls, _ = streamed([text[: end % len(text)]], cut=True, tools=TOOLS)
    assert "<think>".startswith(content.strip()) or "<tool_call>".startswith(content.strip())  # half a tag is no tag
    for (called, got), whole in zip(calls, arguments, strict=False):
        assert called == "look"
        assert is_beginning(json.loads(got), whole)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"name": "look", "arguments": {"a": "b', {"a": "b"}),
        ('{"name": "look", "arguments": {"a": 1, "b": 12', {"a": 1}),
        ('{"name": "look", "arguments": {"a": [1, {"b": "\\ud83d', {"a": [1, {"b": ""}]}),
        ('{"name": "look",', {}),
        ('{"arguments": {"a": 1}, "name": "look"}', {"a": 1}),
        ('{"name": "look", "arguments": "{\\"a\\": 1}"}', {"a": 1}),
        ('{"name": "look", "arguments": null}', {}),
        ('{"name": "look", "arguments": {"a": 1,}}', {"a": 1}),
        ('{"name": "look", "arguments": {"a": True, "b": oops, "c": 1}}', {"a": True}),
        ('{"name": "look", "arguments": {"a": NaN}}', {}),
        ('{"name": "look", "arguments": {"a": "line\nbreak\t"}}', {"a": "line\nbreak\t"}),
        ('{"name": "look", "arguments": {"a": ' + "[" * 1000, None),
        ("<function=look>\n<parameter=text>\n5\n</parameter>\n<parameter=count>\n5", {"text": "5"}),
        ("<function=look>\n<parameter=text>\n\n a\n\n</parameter>\n</function>", {"text": "\n a\n"}),
        ("<function=look>\n<parameter=count>many</parameter>\n</function>", {"count": "many"}),
        ("<function=look>\n<parameter=count>5.0</parameter>\n</tool_call>", {"count": 5}),
        ("<function=look>\n<parameter=unknown>5</parameter>\n<param", {"unknown": "5"}),
        ("<function=other>\n</function>", {}),
        ("<function=look>\noops <parameter=count>1</parameter>\n</function>", {}),
    ],
)
def test_calls_that_are_cut_or_wrong(text: str, arguments: Any) -> None:
    for pieces in ([text], list(text)):
        _, content, calls, _ = streamed(["<tool_call>\n", *pieces], tools=TOOLS)
        assert content == ""
        assert len(calls) == 1
        assert arguments is None or json.loads(calls[0][1]) == arguments
        json.loads(calls[0][1])


@pytest.mark.parametrize(
    "text", ["Use <tool_call> tags", "<tool_call>\n{}", '<tool_call>{"name": 1}</tool_call>', "<tool_call>"]
)
def test_what_is_no_call_is_content(text: str) -> None:
    for pieces in ([text], list(text)):
        assert streamed(pieces, tools=TOOLS)[:3] == ("", text, [])


def test_a_call_without_a_name_is_left_out_when_cut() -> None:
    assert streamed(['Yes. <tool_call>\n{"na'], cut=True, tools=TOOLS)[:3] == ("", "Yes.", [])


TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<function=look>", "</function>", "<parameter=count>"]
TAGS += [
    "<parameter=text>",
    "</parameter>",
    '{"name": "look", "arguments": {',
    '"a": "',
    '"',
    "}",
    ", ",
    "1",
    "\\",
    "\n",
]
soups = st.lists(
    st.sampled_from(TAGS) | st.sampled_from(TAGS).map(lambda tag: tag[:-1]) | st.text(max_size=3), max_size=12
)


@settings(max_examples=300, deadline=None)
@given(soup=soups, cuts=st.lists(st.integers(0, 300), max_size=8), open_=st.booleans(), tools=st.booleans())
def test_how_the_text_is_cut_makes_no_difference(soup: list[str], cuts: list[int], open_: bool, tools: bool) -> None:
    text = "".join(soup)
    options: dict[str, Any] = {"thinking_open": open_, "tools": TOOLS if tools else None}
    whole = streamed([text], **options)[:3]
    assert streamed(pieces_of(text, cuts), **options)[:3] == whole
    assert streamed(list(text), **options)[:3] == whole
    for _, arguments in whole[2]:
        json.loads(arguments)
    if not open_ and not whole[0] and not whole[2] and "</think>" not in text:
        assert whole[1] == text or text.lstrip().startswith("<think>")  # nothing is lost


def test_long_arguments_stream_in_time_proportional_to_their_length() -> None:
    text = '<tool_call>\n{"name": "look", "arguments": {"text": "' + "ab c" * 25_000
    stream = AnswerStream(tools=TOOLS)
    before = time.process_time()
    for i in range(0, len(text), 4):
        stream.push(text[i : i + 4])
    stream.finish(cut=True)
    assert time.process_time() - before < 1  # 0.1 s
    assert len(json.loads(stream.tool_calls[0]["function"]["arguments"])["text"]) == 100_000
