"""Answers held to a format: they parse, and are the same in a tree as in plain decoding; too hard ones are refused."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydflash
from pydflash import Session, _grammar, options
from pydflash._lib import check, ffi, lib
from pydflash.constraint import Constraint
from pydflash.tokenizer import Tokenizer
from tests.core_steps import DEFAULTS, Said, say

N_MOST = 400  # tokens; every format here ends before


# ---- formats, and what is an answer in them ----------------------------------------------------------------------


def random_schema(rng: np.random.Generator, depth: int = 3) -> dict[str, Any]:
    """A schema whose answers are of bounded length."""
    kinds = ["string", "integer", "boolean", "null", "enum", "const"] + ["object", "array"] * (depth > 0)
    kind = str(rng.choice(kinds)) if depth < 3 else "object"
    if kind == "string":
        return {"type": "string", "maxLength": int(rng.integers(1, 9))}
    if kind == "integer":
        low = int(rng.integers(-50, 50))
        return {"type": "integer", "minimum": low, "maximum": low + int(rng.integers(0, 500))}
    if kind == "enum":
        return {"enum": rng.choice(["red", "green", "Grün", 1, 2.5, None, True], 3, replace=False).tolist()}
    if kind == "const":
        return {"const": {"version": int(rng.integers(9)), "tags": ["a", "b"]}}
    if kind == "array":
        low = int(rng.integers(0, 2))
        return {"type": "array", "items": random_schema(rng, depth - 1), "minItems": low, "maxItems": low + 2}
    if kind == "object":
        names = rng.choice(["name", "city", "is_open", "größe", "n"], int(rng.integers(1, 4)), replace=False).tolist()
        properties = {name: random_schema(rng, depth - 1) for name in names}
        required = [name for name in names if rng.random() < 0.7]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": kind}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """JSON Schema, as far as random_schema goes."""

    def same(a: Any, b: Any) -> bool:  # 1 is not True
        return json.dumps(a) == json.dumps(b)

    if "enum" in schema:
        return any(same(value, item) for item in schema["enum"])
    if "const" in schema:
        return same(value, schema["const"])
    kind = schema["type"]
    if kind == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "array":
        return (
            isinstance(value, list)
            and schema["minItems"] <= len(value) <= schema["maxItems"]
            and all(fits(item, schema["items"]) for item in value)
        )
    if kind == "object":
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value) <= set(schema["properties"])
            and all(fits(item, schema["properties"][name]) for name, item in value.items())
        )
    return type(value) is {"boolean": bool, "null": type(None)}[kind]


REGEXES = [
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}",
    r"(yes|no|perhaps), (because|since) [a-z]{3,12}\.",
    r"[A-Z][a-z]{1,9}( [A-Z][a-z]{1,9}){1,3}",
    r"(a{2}b){1,8}c?",
    r"#[0-9a-fA-F]{6}",
    r"[äöüß€𝄞]{3,5}!",
    r"\{\"k\": \[[0-9]{1,3}(, [0-9]{1,3}){0,4}\]\}",
]
CHOICES = [
    ["yes", "no"],
    ["red", "green", "blue", "reddish"],
    ["ja, gerne", 'nein "danke"', "a\nb", "€\\"],
    ["only this"],
]

SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "repeat_penalty": 1.1}


def formats() -> list[tuple[dict[str, Any], Any]]:
    """30 response formats and functions that tell whether a text is an answer."""
    rng = np.random.default_rng(7)
    out: list[tuple[dict[str, Any], Any]] = []
    for i in range(30 - len(REGEXES) - len(CHOICES)):
        schema = random_schema(rng)
        wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        out.append(
            (wrapped if i % 2 else {"json_schema": schema}, lambda text, schema=schema: fits(json.loads(text), schema))
        )
    out += [({"regex": regex}, lambda text, regex=regex: re.fullmatch(regex, text) is not None) for regex in REGEXES]
    out += [({"choice": choice}, lambda text, choice=choice: text in choice) for choice in CHOICES]
    return out


FORMATS = formats()


def constrained(session: Session, response_format: dict[str, Any], *, n: int = N_MOST, **given: Any) -> Said:
    assert session.tokenizer is not None
    constraint = Constraint.compile(response_format, session.tokenizer)
    assert constraint is not None
    prompt = given.pop("prompt", session.tokenize("What is it?\n"))
    return say(session, prompt, n, constraint=constraint, stop_ids=sorted(constraint.stop_ids), **given)


def text_of(session: Session, said: Said) -> str:
    """An answer that ended by itself: valid UTF-8 up to a stop token."""
    tokenizer = session.tokenizer
    assert tokenizer is not None
    assert said.ids[-1] in tokenizer.stop_ids
    assert not tokenizer.special_ids & set(said.ids[:-1])
    return tokenizer.decode_bytes(said.ids[:-1]).decode()


@pytest.fixture(scope="module")
def shipped() -> Iterator[Session]:
    with Session(kv_type="f32", n_ctx=1024, n_threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def tiny(tiny_target: Path, tiny_draft: Path) -> Iterator[Session]:
    with Session(tiny_target, tiny_draft, kv_type="f32", n_ctx=512, n_threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def tokenizer(tiny: Session) -> Tokenizer:
    assert tiny.tokenizer is not None
    return tiny.tokenizer


# ---- what comes out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["shipped", "tiny"])
def test_answers_are_in_the_format(which: str, request: pytest.FixtureRequest) -> None:
    session: Session = request.getfixturevalue(which)
    for seed, (response_format, is_answer) in enumerate(FORMATS):
        sampling = {"temperature": 1.5, "seed": seed} if seed % 2 else {}
        text = text_of(session, constrained(session, response_format, **sampling))
        assert is_answer(text), f"{text!r} for {response_format}"


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_tree_chain_and_plain_say_the_same(tiny: Session, sampling: dict[str, Any]) -> None:
    for seed, (response_format, _) in enumerate(FORMATS):
        given = {**sampling, "seed": seed, "n": 120}
        plain = constrained(tiny, response_format, budget=0, **given)
        assert plain.n_steps == len(plain.ids)
        rng = np.random.default_rng(seed)

        def part(n_tokens: int, rng: np.random.Generator = rng) -> int:
            return int(rng.integers(1, n_tokens + 1))

        for settings in ({"budget": 16}, {"budget": 7, "chain": True}, {"budget": 12, "keep": part}):
            assert constrained(tiny, response_format, **settings, **given).ids == plain.ids, response_format


def test_nothing_forbidden_is_in_the_tree(shipped: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every node was asked about and allowed; some candidates were not."""
    answers: list[bool] = []
    allowed = Constraint._allowed

    def recorded(self: Constraint, path: tuple[int, ...], token: int) -> bool:
        answers.append(allowed(self, path, token))
        # The matcher's own word on it, by another way.
        bits = ffi.new("uint32_t[]", (self._n_vocab + 31) // 32)
        with self._at(list(path)) if self.stop_ids.isdisjoint(path) else nullcontext() as matcher:
            if matcher:
                _grammar.fill(matcher, bits, self._n_vocab)
        assert answers[-1] == bool(bits[token // 32] >> token % 32 & 1)
        return answers[-1]

    monkeypatch.setattr(Constraint, "_allowed", recorded)
    core, tokenizer = shipped._core.session, shipped.tokenizer
    assert tokenizer is not None
    n_refused = 0
    for response_format, _ in FORMATS[:8]:
        constraint = Constraint.compile(response_format, tokenizer)
        assert constraint is not None
        stop_ids = sorted(tokenizer.stop_ids)
        params, _arrays = options.generate_params(budget=16, chain=False, **{**DEFAULTS, "stop_ids": stop_ids})
        check(lib.pf_session_reset(core))
        check(lib.pf_session_configure(core, params))
        check(lib.pf_session_append(core, [5, 6, 7], 3))
        check(lib.pf_session_constrain(core, constraint.attach()))
        step = ffi.new("pf_step_result *", {"size": ffi.sizeof("pf_step_result")})
        while not step.stopped:
            answers.clear()
            constraint.check(lib.pf_session_step(core, 64, step))
            assert answers.count(True) == step.n_nodes - 1
            n_refused += answers.count(False)
            check(lib.pf_session_commit(core, step.n_tokens, ffi.NULL))
            constraint.commit(list(step.tokens[0 : step.n_tokens]))
    assert n_refused > 0


def test_forced_tokens_raise_tokens_per_pass(shipped: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["identifier", "description of the item", "number of pieces in stock", "is it available now"]
    schema = {
        "type": "object",
        "properties": {name: {"type": "integer", "minimum": 0, "maximum": 999} for name in names},
        "required": names,
        "additionalProperties": False,
    }
    with_forced = constrained(shipped, {"json_schema": schema})
    monkeypatch.setattr(Constraint, "_forced", lambda self: [])
    without = constrained(shipped, {"json_schema": schema})
    assert len(with_forced.ids) > 40
    assert with_forced.n_steps <= without.n_steps / 2


def test_a_grammar_behind_some_text(tiny: Session) -> None:
    """Anything but an end until the first token of the text, the whole of the text, then the grammar."""
    tokenizer = tiny.tokenizer
    assert tokenizer is not None
    after = tokenizer.encode("e>\n")
    assert len(after) == 3
    runs = []
    for budget in (0, 16):
        constraint = Constraint.compile({"choice": ["yes", "no"]}, tokenizer, after="e>\n")
        assert constraint is not None
        runs.append(
            say(
                tiny,
                [1, 2, 3],
                200,
                constraint=constraint,
                budget=budget,
                stop_ids=sorted(constraint.stop_ids),
                temperature=1.0,
                seed=2,
                logit_bias={after[0]: 3.0, after[1]: -50.0, 287: 100.0},
            )
        )
        assert constraint.complete
    assert runs[0].ids == runs[1].ids
    at = runs[0].ids.index(after[0])
    assert at > 0
    assert runs[0].ids[at : at + 3] == after
    assert tokenizer.decode(runs[0].ids[at + 3 : -1]) in ("yes", "no")


def test_lark_and_json_object(tiny: Session, shipped: Session) -> None:
    lark = 'start: "[" item ("," item){2} "]"\nitem: /[a-z]{1,4}/ | "<" item ">"'
    said = constrained(tiny, {"lark": lark}, temperature=1.0, seed=4)
    assert re.fullmatch(r"\[[a-z<>]+,[a-z<>]+,[a-z<>]+\]", text_of(tiny, said))
    # An object may be of any length: here the model may cut it, or the end of the run.
    said = constrained(shipped, {"type": "json_object"}, n=100, temperature=1.0, seed=1)
    text = shipped.detokenize(said.ids, skip_special=True)
    assert text.startswith("{")
    if said.ids[-1] in shipped.tokenizer.stop_ids:  # type: ignore[union-attr]
        assert isinstance(json.loads(text), dict)


def test_generate_and_stream(shipped: Session) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}}, "required": ["n"]}
    form = {"json_schema": {**schema, "additionalProperties": False}}
    for ignore_eos in (False, True):  # the grammar's end ends the run all the same
        result = shipped.generate("How many? ", response_format=form, ignore_eos=ignore_eos)
        assert result.finish_reason == "stop"
        assert json.loads(result.text)["n"] in range(1, 10)
    chunks = list(shipped.stream("How many? ", response_format={"choice": ["one", "two"]}, temperature=1.0))
    assert "".join(chunk.text for chunk in chunks) in ("one", "two")
    assert shipped.generate("How many? ", max_tokens=8, response_format={"type": "text"}).ids == (
        shipped.generate("How many? ", max_tokens=8).ids
    )
    with pytest.raises(pydflash.ArgumentError, match="response_format"):
        shipped.generate("How many? ", response_format={"regex": "("})


def test_no_constraint_from_then_on(tiny: Session) -> None:
    free = say(tiny, [4, 5], 20).ids
    constrained(tiny, {"choice": ["a"]}, prompt=[4, 5])
    assert say(tiny, [4, 5], 20).ids == free


# ---- what goes wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["_mask", "_allowed", "_forced"])
def test_what_a_function_raises_is_the_steps_error(
    tiny: Session, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Constraint, name, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            constrained(tiny, {"json_schema": {"type": "string"}})
    assert tiny.n_tokens == len(tiny.tokenize("What is it?\n"))  # what stood still stands
    assert capfd.readouterr().err == ""
    assert text_of(tiny, constrained(tiny, {"choice": ["yes", "no"]})) in ("yes", "no")


def test_a_bias_against_all_that_is_allowed(tiny: Session, tokenizer: Tokenizer) -> None:
    bias = dict.fromkeys(tokenizer.encode("x"), float("-inf"))
    with pytest.raises(pydflash.ArgumentError, match="logit_bias"):
        constrained(tiny, {"choice": ["x"]}, logit_bias=bias)


def test_a_grammar_that_becomes_too_hard_on_the_way(tiny: Session) -> None:
    with pytest.raises(pydflash.ArgumentError, match="can go no further: lexer error: too many"):
        constrained(tiny, {"regex": "a{1000000000}"})


@pytest.mark.parametrize(
    ("response_format", "sentence"),
    [
        ("json", "'json', not a mapping"),
        ({}, "give a type"),
        ({"regex": "a", "choice": ["b"]}, "give a type"),
        ({"type": "json_scheme"}, "did you mean 'json_schema'"),
        ({"type": "json_schema"}, "no 'json_schema'"),
        ({"type": "json_schema", "json_schema": {}}, "holds no 'schema'"),
        ({"json_schema": [1]}, "a JSON schema is an object, not list"),
        ({"json_schema": {"type": {1, 2}}}, "is not JSON"),
        ({"regex": 5}, "regex must be text, not int"),
        ({"regex": "a\ud800"}, "surrogates"),
        ({"choice": "yes"}, "must be a list"),
        ({"choice": []}, "must be a list"),
        ({"choice": ["a", 1]}, "not text"),
        ({"regex": "a?" * 5000}, "10000 characters, but 8192 at most"),
        ({"json_schema": {"pattern": "a?" * 5000}}, "10000 characters of patterns, but 8192 at most"),
        ({"json_schema": {"anyOf": [{"multipleOf": 999983}]}}, "more than 5 digits"),
        ({"json_schema": {"items": {"multipleOf": 1e6}}}, "more than 5 digits"),
        ({"json_schema": {"properties": {f"p{i}": {} for i in range(10_000)}}}, "parts, but 10000 at most"),
        # From here on in llguidance's own words.
        ({"regex": "(abc"}, "unclosed group"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"regex": "(?=a)b"}, "look-ahead"),
        ({"lark": "start: thing"}, "unknown name"),
        ({"lark": "start: start"}, "NoExtension"),
        ({"lark": ""}, "Empty grammar"),
        ({"lark": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, "deeply nested"),
        ({"json_schema": {"type": "strin"}}, "Invalid type: strin"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json_schema": {"type": "integer", "minimum": 2, "maximum": 1}}, "Unsatisfiable"),
        ({"json_schema": {"type": "string", "pattern": "(["}}, "unclosed character class"),
        ({"json_schema": {"$ref": "#"}}, "NoExtension"),
        ({"json_schema": {"$ref": "https://example.com/schema.json"}}, "not present"),
        ({"json_schema": {"$ref": "#/$defs/a", "$defs": {"b": {}}}}, "a"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused(tokenizer: Tokenizer, response_format: Any, sentence: str) -> None:
    with pytest.raises(pydflash.ArgumentError, match=sentence) as caught:
        Constraint.compile(response_format, tokenizer)
    assert "response_format" in str(caught.value)


def nested(n: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(n):
        schema = {"type": "array", "items": schema}
    return schema


def chain(n: int) -> dict[str, Any]:
    """Definitions each of which holds the next."""
    link = {"type": "object", "required": ["x"], "additionalProperties": False}
    defs = {f"d{i}": {**link, "properties": {"x": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(n)}
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{n}": {"type": "null"}}}


def test_deep_schemas_are_refused_or_work(tiny: Session, tokenizer: Tokenizer) -> None:
    """llguidance recurs: on a stack of the usual size 1,000 links of a chain end the process."""
    assert isinstance(json.loads(text_of(tiny, constrained(tiny, {"json_schema": nested(50)}, temperature=1.0))), list)
    for schema, sentence in (
        (nested(500), "recursion"),
        (nested(10_000), "recursion"),
        (chain(5_000), "parts, but"),
    ):
        with pytest.raises(pydflash.ArgumentError, match=sentence):
            Constraint.compile({"json_schema": schema}, tokenizer)
    constraint = Constraint.compile({"json_schema": chain(1_200)}, tokenizer)
    assert constraint is not None
    said = say(tiny, [1], 100, constraint=constraint, stop_ids=sorted(tokenizer.stop_ids))
    assert tokenizer.decode(said.ids).startswith('{"x": {"x": {"x": ')


def test_a_big_choice(tiny: Session) -> None:
    items = [f"item {i * 7919 % 1_000_003}" for i in range(20_000)]
    assert text_of(tiny, constrained(tiny, {"choice": items}, temperature=1.0)) in items
    assert json.loads(text_of(tiny, constrained(tiny, {"json_schema": {"enum": items[:5000]}}))) in items


def test_compiling_has_a_time_limit(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    _grammar._vocabulary(tokenizer)
    monkeypatch.setattr(_grammar, "TIME_LIMIT", 0.02)
    names = [f"p{i}" for i in range(1500)]
    hard = {"type": "object", "properties": {name: {"type": "integer"} for name in names}}
    started = time.perf_counter()
    with pytest.raises(pydflash.ArgumentError, match=r"more than 0\.02 s"):
        Constraint.compile({"json_schema": hard}, tokenizer)
    assert time.perf_counter() - started < 5
    for thread in threading.enumerate():  # let it end before the next test
        if thread.name == "pydflash-constraint":
            thread.join()


def test_a_tokenizer_without_an_end() -> None:
    letters = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    with pytest.raises(pydflash.UnsupportedModelError, match="no end token"):
        Constraint.compile({"choice": ["a"]}, Tokenizer(letters, [], pre="gpt2"))


def test_text_is_no_constraint(tokenizer: Tokenizer) -> None:
    assert Constraint.compile({"type": "text"}, tokenizer) is None
    json_object = Constraint.compile({"type": "json_object"}, tokenizer)
    assert json_object is not None
    assert not json_object.complete


def test_the_core_checks_a_constraint(tiny: Session) -> None:
    core = tiny._core.session
    for fields in ({}, {"size": ffi.sizeof("pf_constraint")}, {"size": ffi.sizeof("pf_constraint"), "n_vocab": 5}):
        assert lib.pf_session_constrain(core, ffi.new("pf_constraint *", fields)) == lib.PF_ERR_ARGUMENT
