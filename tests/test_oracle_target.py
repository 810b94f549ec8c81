"""The target against transformers' Qwen3_5ForCausalLM: logits and the inputs of layers, on random small models.

tests/oracles/target.npz holds the expected values; scripts/make_oracles.py made them (its origin entry says with what).
F32 weights and an f32 KV cache, so what differs is the order of sums.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import pydflash
from tests.oracles import cases
from tests.tiny_models import F32, TinyTarget, to_f32, write_gguf

TOLERANCE = 1e-4  # of the largest expected value; wrong mathematics shows at 1e-2 and up


class Expected:
    """One case's vectors, after a check that they were made for the model that the test is about to write."""

    def __init__(self, name: str) -> None:
        case = cases.TARGET_CASES[name]
        with np.load(cases.TARGET_FILE) as file:
            self.ids: npt.NDArray[np.int32] = file[f"{name}.ids"]
            self.positions: npt.NDArray[np.int32] = file[f"{name}.positions"]
            self.logits: F32 = file[f"{name}.logits"]  # [positions, n_vocab]
            self.hidden: F32 = file[f"{name}.hidden"]  # [positions, n_layer, n_embd]
            weights = str(file[f"{name}.weights"])
        assert weights == cases.fingerprint(case.model.hf_weights()), f"{name}: the model changed, {cases.REMAKE}"
        assert len(self.ids) == case.n_tokens, f"{name}: the case changed, {cases.REMAKE}"


def worst(found: F32, expected: F32) -> float:
    """Largest difference in units of the largest expected value."""
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def rms(x: F32) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def open_session(path: Path, **options: object) -> pydflash.Session:
    return pydflash.Session(path, kv_type="f32", n_ctx=512, n_threads=1, **options)


@pytest.fixture(params=cases.TARGET_CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    expected = Expected(name)
    with open_session(cases.TARGET_CASES[name].model.write(tmp_path / "target.gguf")) as session:
        found = session.logits(expected.ids)
    assert worst(found[expected.positions], expected.logits) < TOLERANCE


def test_prompts_of_every_length_end_in_the_same_logits(name: str, tmp_path: Path) -> None:
    """Short ones, and those that end around a multiple of 32 or 64, take other paths through the kernels."""
    expected = Expected(name)
    with open_session(cases.TARGET_CASES[name].model.write(tmp_path / "target.gguf")) as session:
        for position, logits in zip(expected.positions, expected.logits, strict=True):
            found = session.logits(expected.ids[: position + 1])
            assert worst(found[-1], logits) < TOLERANCE, f"{position + 1} tokens"


def test_layer_inputs_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    expected = Expected(name)
    model = cases.TARGET_CASES[name].model
    layers = list(range(model.n_layer))
    with open_session(model.write(tmp_path / "target.gguf")) as session:
        found = session.hidden(expected.ids, layers)
        assert found.shape == (len(expected.ids), len(layers), model.n_embd)
        for layer in layers:
            assert worst(found[expected.positions, layer], expected.hidden[:, layer]) < TOLERANCE, f"layer {layer}"
        # Any subset in any order, as target_layers may list them.
        picked = session.hidden(expected.ids, [2, 0])
    assert np.array_equal(picked, found[:, [2, 0]])


def test_scale_of_the_output_matrix_is_applied(tmp_path: Path) -> None:
    expected, model = Expected("plain"), cases.TARGET_CASES["plain"].model
    tensors = model.tensors()
    tensors["output.weight"] /= 4
    tensors["output.scale"] = np.array([4], np.float32)
    with open_session(write_gguf(tmp_path / "target.gguf", "qwen35", model.gguf_keys(), tensors)) as session:
        found = session.logits(expected.ids)
    assert worst(found[expected.positions], expected.logits) < TOLERANCE


def test_prefill_in_small_chunks_gives_the_same_logits(tmp_path: Path) -> None:
    """What transformers computes in one go, over chunks of 64: state and cache carry everything onward."""
    expected = Expected("plain")
    path = cases.TARGET_CASES["plain"].model.write(tmp_path / "target.gguf")
    with open_session(path, n_batch=64) as session:
        found = session.logits(expected.ids)
    assert worst(found[expected.positions], expected.logits) < TOLERANCE


def test_logits_start_afresh_each_time(tmp_path: Path) -> None:
    """Nothing of an earlier call stays in the recurrent state, the convolution or the cache."""
    expected, model = Expected("plain"), cases.TARGET_CASES["plain"].model
    with open_session(model.write(tmp_path / "target.gguf")) as session:
        session.logits(cases.token_ids(model.n_vocab, 90, seed=7))
        found = session.logits(expected.ids)
    assert worst(found[expected.positions], expected.logits) < TOLERANCE


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_rounded_weights_are_read_as_they_are(kind: str, tmp_path: Path) -> None:
    """A file of another weight type says what the same file says once the gguf package has dequantised it to f32.

    Not to the digit: ggml rounds the other factor of each product too, to 8 bits where the weights are quantised.
    """
    expected, model = Expected("plain"), cases.TARGET_CASES["plain"].model
    path = model.write(tmp_path / "target.gguf", types=kind)
    with open_session(path) as session, open_session(to_f32(path, tmp_path / "f32.gguf")) as dequantised:
        found, same = session.logits(expected.ids), dequantised.logits(expected.ids)
    bound = {"f16": 0.005, "bf16": 0.03}.get(kind, 0.1)
    assert 0 < rms(found - same) < bound * rms(same)
    if kind in ("f16", "bf16", "q8_0"):  # and these barely move the model at all
        logits = found[expected.positions]
        assert 0 < rms(logits - expected.logits) < 2 * bound * rms(expected.logits)


def test_listed_layers_win_over_the_interval(tmp_path: Path) -> None:
    """attention.recurrent_layers wins over a full_attention_interval that says otherwise."""
    expected = Expected("plain")
    model = TinyTarget(interval=3, recurrent=(True, True, True, False))
    with open_session(model.write(tmp_path / "target.gguf")) as session:
        found = session.logits(expected.ids)
    assert worst(found[expected.positions], expected.logits) < TOLERANCE


@pytest.mark.parametrize(
    ("kv_type", "bound"), [("f16", 0.001), ("q8_0", 0.02), (("q8_0", "q4_0"), 0.1), ("q4_0", 0.15)], ids=str
)
def test_smaller_caches_lose_what_llamacpp_loses(kv_type: str | tuple[str, str], bound: float, tmp_path: Path) -> None:
    """Rounded K and V move the logits; llama.cpp on the same file: f16 0.0008, q8_0 0.0055, q4_0 0.09 of the spread."""
    expected = Expected("deep")
    with pydflash.Session(
        cases.TARGET_CASES["deep"].model.write(tmp_path / "target.gguf"), kv_type=kv_type, n_threads=1
    ) as session:
        found = session.logits(expected.ids)[expected.positions]
    assert 0 < rms(found - expected.logits) < bound * rms(expected.logits)
