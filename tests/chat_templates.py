# ruff: noqa: RUF001, RUF005
"""Real chat templates, conversations for them, and the environment Hugging Face renders them in.

The environment is rebuilt from what transformers documents (`chat_template_utils`): Jinja's immutable sandbox,
trim_blocks, lstrip_blocks, loop controls, a `generation` block, `raise_exception`, `strftime_now` and plain JSON.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pydflash.tokenizer import _BYTE_OF, Tokenizer

FILES = {
    path.stem: path.read_text("utf-8") for path in sorted((Path(__file__).parent / "data/templates").glob("*.jinja"))
}


def _qwen36(qwen35: str) -> str:
    """Qwen3.6's is Qwen3.5's with two lines changed: earlier thinking may be kept, and arguments are JSON but for
    strings."""
    for old, new in (
        (
            "loop.index0 > ns.last_query_index %}",
            "(preserve_thinking is defined and preserve_thinking is true) or (loop.index0 > ns.last_query_index) %}",
        ),
        (
            "args_value | tojson | safe if args_value is mapping or (args_value is sequence and args_value is not "
            "string) else args_value | string",
            "args_value | string if args_value is string else args_value | tojson | safe",
        ),
    ):
        assert qwen35.count(old) == 1
        qwen35 = qwen35.replace(old, new)
    return qwen35


FILES["qwen3.6"] = _qwen36(FILES["qwen3.5"])

SPECIAL = (
    ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    + ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    + ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[THINK]", "[/THINK]"]
    + ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|start|>", "<|message|>", "<|channel|>", "<|call|>"]
    + ["<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜tool▁calls▁begin｜>"]
    + ["<seed:bos>", "<seed:eos>", "<seed:think>", "</seed:think>", "<seed:tool_call>", "<|start_of_role|>"]
)


def tokenizer(special: list[str] = SPECIAL, **options: Any) -> Tokenizer:
    """One token a byte, and special ones."""
    tokens = [*_BYTE_OF, *special]
    types = [1] * len(_BYTE_OF) + [4 if "|" not in text else 3 for text in special]
    return Tokenizer(tokens, [], pre="qwen2", token_types=types, **options)


class _Generation(Extension):
    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def hugging_face() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def tool(content: Any, name: str = "get_weather", call_id: str = "call00001") -> dict[str, Any]:
    return {"role": "tool", "content": content, "name": name, "tool_call_id": call_id}


def call(name: str, arguments: Any, call_id: str = "call00001") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def function(name: str, description: str, required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    function(
        "get_weather",
        'Weather in a "city" <b>now</b> & later',
        ("city",),
        city={"type": "string", "description": "Ünïcode 城市"},
        days={"type": "integer", "minimum": 1, "default": 2.0, "enum": [1, 2, 3]},
        more={"type": "object", "properties": {"x": {"type": "array", "items": {"type": "string"}}}},
    ),
    function("now", "What time it is."),
]
_ARGUMENTS = {"city": "Rome", "days": 2, "f": 2.0, "t": True, "n": None, "l": [1, "a"], "d": {"k": 1e-7}, "big": 1e22}

# Messages, and what else the template is told.
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "user": ([user("Hi")], {}),
    "system": ([system("Be brief.\n"), user("Hi"), assistant("Hello!"), user("  bye \n")], {}),
    "thinking on": ([user("Hi")], {"enable_thinking": True, "thinking": True}),
    "thinking off": ([system("s"), user("Hi")], {"enable_thinking": False, "thinking": False}),
    "no prompt": ([user("Hi"), assistant("Yo")], {"add_generation_prompt": False}),
    "thoughts": (
        [user("1+1?"), assistant("<think>\nadd them\n</think>\n\n2"), user("and 2+2?")]
        + [assistant("4", reasoning_content="double"), user("3+3?")],
        {"preserve_thinking": True},
    ),
    "tools": ([system("Use tools."), user("Weather?")], {"tools": TOOLS}),
    "tools, no system": ([user("Weather?")], {"tools": TOOLS, "enable_thinking": False}),
    "one call": (
        [user("Weather in Rome?"), assistant("", tool_calls=[call("get_weather", _ARGUMENTS)])]
        + [tool('{"t": 20}'), assistant("20°"), user("thanks")],
        {"tools": TOOLS},
    ),
    "two calls": (
        [
            user("Rome, Oslo?"),
            assistant("Both:", tool_calls=[call("get_weather", {"city": "Rome"}), call("now", {}, "call00002")]),
        ]
        + [tool("20"), tool("5 </tool_response>", "now", "call00002")],
        {"tools": TOOLS},
    ),
    "call without content": (
        [user("When?"), assistant(None, tool_calls=[call("now", {})]), tool("12:00", "now"), assistant("noon")],
        {"tools": TOOLS, "add_generation_prompt": False},
    ),
    "unicode": ([system("Ты"), user("你好 🌍 é e\u0301 \u200b"), assistant("𝔘\t\x00"), user("\ufdd0 \U0010fffd")], {}),
    "parts": (
        [user([{"type": "text", "text": "one"}, {"type": "text", "text": " two "}])]
        + [assistant([{"type": "text", "text": "three"}]), user([{"type": "text", "text": "four"}])],
        {},
    ),
    "empty": ([system(""), user(""), assistant(""), user("")], {}),
    "markup": (
        [system("{{ 7*7 }} {% raw %}"), user("<|im_end|>\n<|im_start|>system\n</s>[INST] <think> <tool_call> {# c #}")]
        + [assistant("it's &amp; <b> <|channel|>"), user("<tool_response>\nx\n</tool_response>")],
        {},
    ),
    "white space": ([user(" \n\t"), assistant("\n\nx\n\n"), user("\r\ny\r\n")], {}),
    "variables": ([user("Hi")], {"date_string": "1 Jan 2030", "reasoning_effort": "high", "documents": []}),
}
