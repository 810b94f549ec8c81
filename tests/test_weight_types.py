"""A target runs with its matrices in any type ggml can multiply: against the same values as F32.

What differs is the rounding of activations, which ggml's quantised products do on their own; it is small beside what
the weights themselves lose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

import pydflash
from pydflash._lib import check, ffi, lib
from tests.tiny_models import F32, TinyTarget, add_key, write_gguf

MODEL = TinyTarget(n_layer=2, interval=2, n_embd=256, n_ff=256, n_vocab=256, k_heads=4, v_heads=8, state=32, n_head=8)
IDS = list(np.random.RandomState(0).randint(0, 256, 70))
# Largest difference of the logits over the largest logit: activations in blocks of 8 bits, or 16-bit floats.
TYPES = {
    "f16": 2e-3, "bf16": 1e-2, "q4_0": 0.04, "q4_1": 0.04, "q5_0": 0.04, "q5_1": 0.04, "q8_0": 0.04, "q2_K": 0.06,
    "q3_K": 0.04, "q4_K": 0.04, "q5_K": 0.04, "q6_K": 0.04, "iq4_nl": 0.04, "iq4_xs": 0.04, "mxfp4": 0.04,
}  # fmt: skip


def quantise(x: F32, kind: int) -> npt.NDArray[np.uint8]:
    out = np.empty((x.shape[0], lib.pf_row_size(kind, x.shape[1])), np.uint8)
    source = ffi.from_buffer("float[]", np.ascontiguousarray(x))
    target = ffi.from_buffer(out, require_writable=True)
    check(lib.pf_quantize(kind, source, x.shape[1], x.shape[0], target, out.nbytes))
    return out


def dequantise(raw: npt.NDArray[np.uint8], kind: int, shape: tuple[int, ...]) -> F32:
    out = np.empty(shape, np.float32)
    source = ffi.from_buffer(raw)
    check(lib.pf_dequantize(kind, source, raw.nbytes, out.size, ffi.from_buffer("float[]", out)))
    return out


def write_typed(path: Path, name: str) -> tuple[Path, dict[str, F32]]:
    """The model with every matrix in type `name`, and what its tensors then hold."""
    kind = lib.pf_type_from_name(name.encode())
    writer = gguf.GGUFWriter(str(path), "qwen35")
    held: dict[str, Any] = {}
    for key, value in MODEL.gguf_keys().items():
        add_key(writer, key, value)
    for tensor, data in MODEL.tensors().items():
        if data.ndim == 2 and "conv1d" not in tensor:
            raw = quantise(data, kind)
            writer.add_tensor(tensor, raw, raw_dtype=gguf.GGMLQuantizationType(kind))
            held[tensor] = dequantise(raw, kind, data.shape)
        else:
            writer.add_tensor(tensor, np.ascontiguousarray(data, np.float32))
            held[tensor] = data
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, held


@pytest.mark.parametrize("name", TYPES)
def test_logits_with_weights_of_every_type(name: str, tmp_path: Path) -> None:
    path, held = write_typed(tmp_path / "typed.gguf", name)
    exact = write_gguf(tmp_path / "exact.gguf", "qwen35", MODEL.gguf_keys(), held)
    with pydflash.Session(exact, kv_type="f32", n_threads=1) as session:
        expected = session.logits(IDS)
    with pydflash.Session(path, kv_type="f32", n_threads=1) as session:
        found = session.logits(IDS)
        assert len(session.generate(IDS, max_tokens=5).ids) == 5
    assert 0 < np.abs(found - expected).max() / np.abs(expected).max() < TYPES[name]
