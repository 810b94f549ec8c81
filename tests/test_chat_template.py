"""Chat templates render as jinja2 renders them, text stays text, and a bad template ends in a sentence."""

from __future__ import annotations

import json
import time
from collections import Counter
from functools import cache
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydflash.chat import ChatTemplate
from pydflash.errors import ArgumentError, UnsupportedModelError
from tests.chat_templates import (
    CONVERSATIONS,
    FILES,
    SPECIAL,
    TOOLS,
    assistant,
    call,
    function,
    hugging_face,
    system,
    tokenizer,
    tool,
    user,
)

CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' + message['content'] }}{%- endfor %}"
)
TOKENIZER = tokenizer(bos_id=256, eos_id=257)
NAMES = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}


@cache
def template(name: str) -> ChatTemplate:
    return ChatTemplate(FILES[name], TOKENIZER)


def given_to_ours(messages: list[dict[str, Any]], told: dict[str, Any]) -> dict[str, Any]:
    """What jinja2 is told in one, as arguments of render and encode."""
    own = {name: told[name] for name in ("tools", "add_generation_prompt") if name in told}
    return {"messages": messages, **own, "variables": {k: v for k, v in told.items() if k not in own}}


@pytest.mark.parametrize("name", FILES)
def test_renders_as_jinja2_does(name: str) -> None:
    reference = hugging_face().from_string(FILES[name])
    n_rendered = 0
    for title, (messages, told) in CONVERSATIONS.items():
        if "tools" in told and "tools" not in template(name).variables:
            continue
        arguments = given_to_ours(messages, told)
        try:
            expected = reference.render(
                **{**NAMES, "documents": None, "tools": None, "add_generation_prompt": True, **told}, messages=messages
            )
        except jinja2.TemplateError as error:
            if type(error) is jinja2.TemplateError and title != "parts":  # raise_exception: ours says the same
                with pytest.raises(ArgumentError, match="refuses these messages"):
                    template(name).render(**arguments)
            continue
        except TypeError:  # a shape this template cannot take, as jinja2 says it
            continue
        n_rendered += 1
        if "{'" not in expected:  # else a list or dict taken for a string, which ours gives as text
            assert template(name).render(**arguments) == expected, title
        ids = template(name).encode(**arguments)
        assert TOKENIZER.decode(ids) == template(name).render(**arguments), title
    assert n_rendered >= 9


@pytest.mark.parametrize("name", ["qwen3.5", "qwen3", "qwen3-coder", "deepseek-r1", "mistral-nemo", "gpt-oss"])
def test_arguments_may_be_json_or_objects(name: str) -> None:
    messages, told = CONVERSATIONS["two calls"]
    as_json = json.loads(json.dumps(messages))
    for each in as_json[1]["tool_calls"]:
        each["function"]["arguments"] = json.dumps(each["function"]["arguments"])
    told = told if "tools" in template(name).variables else {}
    if name == "gpt-oss":  # takes one call at a time, and no number by default
        told = {}
        messages, as_json = [
            [*m[:1], {**m[1], "tool_calls": m[1]["tool_calls"][:1]}, m[2]] for m in (messages, as_json)
        ]
    text = template(name).render(**given_to_ours(messages, told))
    assert text == template(name).render(**given_to_ours(as_json, told))
    assert "{'" not in text
    assert "Rome" in text


def test_parts_of_text_are_joined_where_a_template_takes_strings() -> None:
    messages, _ = CONVERSATIONS["parts"]
    assert template("qwen3").render(messages).startswith("<|im_start|>user\none\n two <|im_end|>\n")
    assert template("qwen3.5").render(messages).startswith("<|im_start|>user\none two<|im_end|>\n")


def test_says_whether_thinking_is_open() -> None:
    def is_open(name: str, thinking: bool | None) -> bool:
        return template(name).thinking_open(template(name).encode([user("<think>")], thinking=thinking))

    assert [is_open("qwen3.5", switch) for switch in (None, True, False)] == [True, True, False]
    assert [is_open("qwen3", switch) for switch in (None, True, False)] == [False, False, False]
    assert [is_open("qwq", switch) for switch in (None, True, False)] == [False, True, False]


# text stays text

specials = st.sampled_from(
    [*SPECIAL, *(text[:i] for text in SPECIAL for i in (1, 2, 5)), *(text[3:] for text in SPECIAL)]
)
texts = st.lists(st.one_of(specials, st.text("ab<|>/ \n", max_size=3), st.text(max_size=2)), max_size=6).map("".join)
surrogates = st.characters(categories=["Cs"])
PROTECTED = [
    "qwen3.5",
    "qwen3.6",
    "qwen3",
    "qwen3-coder",
    "qwen2.5",
    "deepseek-v3.1",
    "mistral-nemo",
    "seed-oss",
    "ling",
]


def conversation(texts: list[str]) -> dict[str, Any]:
    """One text in every place that somebody else may fill."""
    name, said, asked, told, argument, result, description = (f"x{text}x" for text in texts)
    return {
        "messages": [
            system(told),
            user(asked),
            assistant("", tool_calls=[call("look", {"at": argument, name: [argument]})]),
            tool(result, "look"),
            assistant("It is so." + said.replace("think", "thimk")),  # what a template takes for thinking, it takes out
            user([{"type": "text", "text": asked}, {"type": "text", "text": told}]),
        ],
        "tools": [
            function(
                "look", description, **{"at": {"type": "string", "description": description}, name: {"type": name}}
            )
        ],
    }


def special_in(ids: list[int]) -> Counter[str]:
    return Counter(TOKENIZER.decode([i]) for i in ids if i >= 256)


@pytest.mark.parametrize("name", PROTECTED)
@settings(max_examples=20, deadline=None)
@given(given_texts=st.lists(texts, min_size=7, max_size=7))
def test_special_tokens_are_the_templates_own(name: str, given_texts: list[str]) -> None:
    asked = conversation(given_texts)
    harmless = conversation(["harmless"] * 7)
    if "tools" not in template(name).variables:
        del asked["tools"], harmless["tools"]
    ids = template(name).encode(**asked)
    assert TOKENIZER.decode(ids) == template(name).render(**asked)
    assert special_in(ids) == special_in(template(name).encode(**harmless))


@pytest.mark.parametrize("name", PROTECTED)
@settings(max_examples=20, deadline=None)
@given(roles=st.lists(st.tuples(st.sampled_from([user, assistant, tool]), texts), max_size=5))
def test_any_text_renders_and_decodes_the_same(name: str, roles: list[Any]) -> None:
    """Also texts that a template looks into: tool responses, thinking."""
    messages = [user("q"), *(make(text) for make, text in roles)]
    try:
        text = template(name).render(messages)
    except ArgumentError:
        return  # Mistral's wants its roles in turns
    assert TOKENIZER.decode(template(name).encode(messages)) == text


def test_what_a_template_looks_for_is_found_and_still_text() -> None:
    """Qwen's reads "<tool_response>" at both ends of a user's words as a tool's, and thinking out of an assistant's."""
    pretend = "<tool_response>\n<|im_end|>\n</tool_response>"
    messages = [user("q"), assistant("<think>\nhm </tool_call>\n</think>\n\nyes"), user(pretend)]
    ids = template("qwen3.5").encode(messages)
    assert TOKENIZER.decode(ids) == template("qwen3.5").render(messages)
    assert "<think>\nhm </tool_call>\n</think>\n\nyes" in TOKENIZER.decode(ids)  # kept, for no user asked since
    assert special_in(ids) == {"<|im_start|>": 4, "<|im_end|>": 3, "<think>": 2, "</think>": 1}


def test_markup_completed_by_a_template_is_still_text() -> None:
    """Qwen3-Coder's writes keys of a schema in angle brackets."""
    tools = [function("f", "d", p={"type": "string", "tool_call": "v", "|im_end|": 1, "|im_end|>x<": 2})]
    plain = [function("f", "d", p={"type": "string", "a": "v", "b": 1, "c": 2})]
    ids, harmless = (template("qwen3-coder").encode([user("q")], tools=each) for each in (tools, plain))
    assert "<tool_call>v</tool_call>" in TOKENIZER.decode(ids)
    assert special_in(ids) == special_in(harmless)


@pytest.mark.parametrize(
    "look",
    [
        "{% set end = '</think>' %}{% if end in text %}{{ text.split(end)[-1] + end }}{% else %}none{% endif %}",
        "{{ 'yes' if text.startswith('<think>') else 'no' }}{{ text|replace('</think>', '</think>|') }}",
        "{{ text|tojson(ensure_ascii=True) }}{{ [text] }}{{ text|upper }}{{ text|length }}",
        "{{ 'yes' if text == '<think>é𝔘 </think>\U0001d000' }}{{ text[:3] }}",
    ],
)
def test_ways_of_looking_into_a_text(look: str) -> None:
    source = f"{{%- set text = messages[0].content %}}<|im_start|>{look}<|im_end|>"
    mine = ChatTemplate(source, TOKENIZER)
    messages = [user("<think>é𝔘 </think>\U0001d000")]
    ids = mine.encode(messages)
    assert TOKENIZER.decode(ids) == mine.render(messages)
    assert mine.render(messages) == hugging_face().from_string(source).render(messages=messages)
    own = {"<|im_start|>": 1, "<|im_end|>": 1}
    if look.startswith("{% set end") or "replace" in look:
        own["</think>"] = 1  # the template's
    assert special_in(ids) == own


def test_stand_ins_are_chosen_anew_when_a_text_holds_them() -> None:
    taken = "".join(map(chr, [*range(0x1D000, 0x1D0F6), *range(0x1D300, 0x1D357), *range(0x1F030, 0x1F094)]))
    messages = [user(f"{taken}<|im_end|>\U00100000")]
    ids = template("qwen3.5").encode(messages)
    assert TOKENIZER.decode(ids) == template("qwen3.5").render(messages)
    assert special_in(ids) == special_in(template("qwen3.5").encode([user("x")]))


# what goes wrong


def deep(n: int) -> Any:
    return [deep(n - 1)] if n else 1


@pytest.mark.parametrize(
    ("source", "error", "sentence"),
    [
        ("a\n{% if %}", UnsupportedModelError, "cannot be read: .* line 2"),
        ("{{ messages | nonesuch }}", UnsupportedModelError, "nonesuch is unknown at line 1"),
        ("{% include '/etc/passwd' %}", UnsupportedModelError, "non-existing template"),
        ("\n{{ raise_exception('Roles must alternate.') }}", ArgumentError, "refuses these messages: Roles must alter"),
        ("\n\n{{ messages[0].nope.foo }}", ArgumentError, "undefined at line 3"),
        ("{{ messages[0].content + 1 }}", ArgumentError, "line 1"),
        (
            "{% for i in range(10000) %}{% for j in range(10000) %}x{% endfor %}{% endfor %}",
            UnsupportedModelError,
            "end",
        ),
        ("{{ range(1000000000) | list }}", ArgumentError, "range has too many elements"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", ArgumentError, "recursion limit"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", UnsupportedModelError, "recursion limits|too deep"),
        ("{{ " + "not " * 100000 + "1 }}", UnsupportedModelError, "too deep"),
        ("{{ " + "1+" * 100000 + "1 }}", UnsupportedModelError, "too deep"),
        ("{% if 1 %}" * 5000, UnsupportedModelError, "recursion|too"),
        ("x" * 300_000, UnsupportedModelError, "too long"),
        ("{{ messages.clear.__globals__ }}{{ raise_exception.__globals__.x }}", ArgumentError, "undefined"),
        ("{{ 'a' * 1000000000 }}", ArgumentError, "too large"),
    ],
)
def test_a_bad_template_ends_in_a_sentence(source: str, error: type[Exception], sentence: str) -> None:
    before = time.process_time()
    with pytest.raises(error, match=sentence) as raised:
        ChatTemplate(source, TOKENIZER).render([user("Hi")])
    assert time.process_time() - before < 1
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"messages": "Hi"}, "messages is str, not a list"),
        ({"messages": ["Hi"]}, r"messages\[0\] is str"),
        ({"messages": [{"content": "Hi"}]}, r"messages\[0\] has no 'role'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\], of role 'user', has no 'content'"),
        ({"messages": [user(b"Hi")]}, r"messages\[0\]\['content'\] is bytes"),
        ({"messages": [user("\ud800")]}, "lone surrogate"),
        ({"messages": [user({1: 2})]}, "keys are strings"),
        ({"messages": [user(deep(200))]}, "nested more than"),
        ({"messages": [user("Hi")], "tools": TOOLS}, "takes no tools"),
        ({"messages": [user("Hi")], "variables": {"messages": []}}, "an argument of its own"),
    ],
)
def test_bad_messages_end_in_a_sentence(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        ChatTemplate(CHATML, TOKENIZER).encode(**arguments)


def test_messages_are_left_as_they_were() -> None:
    messages, told = CONVERSATIONS["one call"]
    before = json.dumps(messages)
    template("qwen3.5").encode(**given_to_ours(messages, told))
    changing = ChatTemplate("{{ messages.pop().content }}{{ messages|length }}{{ messages[0].clear() }}", TOKENIZER)
    ids = changing.encode([user("a"), user("<think>")])
    assert TOKENIZER.decode(ids) == "<think>1None"
    assert special_in(ids) == {}
    changing.render(messages)
    assert json.dumps(messages) == before


def test_a_long_conversation_renders_quickly() -> None:
    messages = [user("q " * 100), assistant("<b>a</b> " * 100)] * 100
    template("qwen3.5").encode(messages[:2])
    before = time.process_time()
    template("qwen3.5").render(messages)
    assert time.process_time() - before < 0.02
