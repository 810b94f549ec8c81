"""The shipped target against llama.cpp: the same tokens, greedily, and the same log-probabilities after a prompt.

tests/oracles/llamacpp.json and .npz hold what llama.cpp said; scripts/make_oracles.py asked it. Both sides run the
model dequantised to f32 with an f32 KV cache, so they can be held to the token; where the two likeliest tokens are
closer than NEAR_TIE, the order of sums may decide, and the comparison of that prompt ends there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import pydflash
from pydflash.models import target_path
from tests.oracles import cases
from tests.tiny_models import to_f32

NEAR_TIE = 1e-3
MOST_NEAR_TIES = 2  # prompts whose comparison may end early


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    """What llama.cpp said, and of which model."""
    document: dict[str, Any] = json.loads(cases.LLAMACPP_FILE.read_text(encoding="utf-8"))
    for name, sha256 in document["sha256"].items():
        shipped = hashlib.sha256(target_path().with_name(name).read_bytes()).hexdigest()
        assert sha256 == shipped, f"{name} is not the model llama.cpp was asked about: {cases.REMAKE}"
    return document


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pydflash.Session]:
    path = to_f32(target_path(), tmp_path_factory.mktemp("llamacpp") / "target-f32.gguf")
    with pydflash.Session(path, kv_type="f32", n_threads=1) as opened:
        yield opened


def test_prompts_are_tokenized_as_llamacpp_does(said: dict[str, Any], session: pydflash.Session) -> None:
    assert len(said["prompts"]) >= 12
    for prompt in said["prompts"]:
        assert session.tokenize(prompt["text"]) == prompt["ids"], prompt["text"]


def test_greedy_tokens_are_those_of_llamacpp(said: dict[str, Any], session: pydflash.Session) -> None:
    n_predict = said["origin"]["request"]["n_predict"]
    near_ties: list[str] = []
    for prompt in said["prompts"]:
        expected = prompt["greedy"]
        found = list(session.generate(prompt["ids"], max_tokens=n_predict, temperature=0, budget=0).ids)
        if prompt["stop"] == "eos":  # whoever says the end token says it last
            found, expected = found[: len(expected)], expected[: len(found)]
        if found == expected:
            continue
        at = next(i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b)
        logits = session.logits(prompt["ids"] + expected[:at])[-1]
        margin = float(logits[found[at]] - logits[expected[at]])
        assert 0 <= margin < NEAR_TIE, (
            f"{prompt['text']!r}: token {at} is {found[at]}, llama.cpp says {expected[at]}, {margin:.2e} below"
        )
        near_ties.append(f"{prompt['text']!r} at token {at}, margin {margin:.1e}")
    assert len(near_ties) <= MOST_NEAR_TIES, near_ties


def log_probabilities(said: dict[str, Any], session: pydflash.Session, kind: str) -> tuple[Any, Any]:
    """Ours and llama.cpp's after the first prompts, [prompts, n_vocab] float64."""
    with np.load(cases.LLAMACPP_LOGPROBS_FILE) as file:
        assert json.loads(str(file["sha256"])) == said["sha256"], f"vectors of different models: {cases.REMAKE}"
        expected = file[f"logprobs.{kind}"].astype(np.float64)
    logits = np.stack([session.logits(p["ids"])[-1] for p in said["prompts"][: len(expected)]]).astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), expected


def test_log_probabilities_are_those_of_llamacpp(said: dict[str, Any], session: pydflash.Session) -> None:
    found, expected = log_probabilities(said, session, "f32")
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["f16", "q4_k_m"])
def test_log_probabilities_of_the_files_as_shipped(said: dict[str, Any], kind: str) -> None:
    """Half-precision and mixed K-quant weights: both sides round the activations, each at its own values."""
    path = target_path().with_name(f"tiny-target-{kind}.gguf")
    with pydflash.Session(path, kv_type="f32", n_threads=1) as opened:
        found, expected = log_probabilities(said, opened, kind)
    assert np.sqrt(np.mean((found - expected) ** 2)) < 0.02 * expected.std()
