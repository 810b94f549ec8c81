"""z-lab folders to GGUF: every key and tensor against tiny_models' own spelling of both, and what is refused."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import pydflash
from pydflash._cache import cache_folder, cached_draft
from pydflash.convert import convert
from tests.tiny_models import TinyDraft, TinyTarget, write_safetensors

SLIDING = ("sliding_attention", "full_attention")


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys and tensors of a GGUF as the gguf package sees them."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return keys, {tensor.name: tensor for tensor in reader.tensors}


def values(tensor: Any) -> np.ndarray[Any, Any]:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape([int(n) for n in reversed(tensor.shape)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A drafter's folder to take apart."""
    return TinyDraft().write_folder(tmp_path / "drafter")


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "draft",
    [
        TinyDraft(),
        TinyDraft(layer_types=SLIDING, sliding_window=12),
        TinyDraft(layer_types=SLIDING),  # causal but unwindowed: a window as long as the context
        TinyDraft(layer_types=SLIDING, sliding_window=12, is_causal=False),
        TinyDraft(is_causal=True),
        TinyDraft(logit_scale=0.5, softcap=30.0, embedding_scale=2.0),
        TinyDraft(extra_config={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        TinyDraft(target_ids=(2, 0, 1), n_layer=1, n_head_kv=4, block_size=16),
    ],
    ids=["plain", "sliding", "causal-unwindowed", "not-causal", "causal", "scaled", "rope_parameters", "other-sizes"],
)
def test_keys_and_tensors(draft: TinyDraft, tmp_path: Path) -> None:
    convert(draft.write_folder(tmp_path / "d"), tmp_path / "ours.gguf")
    ours, our_tensors = read(tmp_path / "ours.gguf")
    theirs, their_tensors = read(draft.write(tmp_path / "theirs.gguf"))
    for name, value in theirs.items():
        assert ours[name] == value, name
    extra = {"general.type": "model", "general.name": "d", "dflash.vocab_size": draft.n_vocab}
    assert {name: value for name, value in ours.items() if name not in theirs} == extra
    assert our_tensors.keys() == their_tensors.keys()
    for name, tensor in our_tensors.items():
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert np.array_equal(values(tensor), values(their_tensors[name])), name


@pytest.mark.parametrize(("dtype", "kind"), [("F16", "F16"), ("BF16", "BF16")])
def test_matrices_keep_their_type(dtype: str, kind: str, tmp_path: Path) -> None:
    draft = TinyDraft()
    convert(draft.write_folder(tmp_path / "d", dtype=dtype), tmp_path / "out.gguf")
    exact = draft.tensors()
    for name, tensor in read(tmp_path / "out.gguf")[1].items():
        assert tensor.tensor_type.name == ("F32" if exact[name].ndim == 1 else kind), name
        bits = {"F16": 11, "BF16": 8}[dtype]
        np.testing.assert_allclose(values(tensor), exact[name], rtol=2.0**-bits, atol=1e-7)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_matrices_become_q8_0(dtype: str, tmp_path: Path) -> None:
    draft = TinyDraft(n_ff=80)  # ffn_down's rows are no multiple of 32: it keeps its type
    convert(draft.write_folder(tmp_path / "d", dtype=dtype), tmp_path / "out.gguf", matrix_type="q8_0")
    exact = draft.tensors()
    for name, tensor in read(tmp_path / "out.gguf")[1].items():
        kept = "F32" if exact[name].ndim == 1 else dtype if "ffn_down" in name else "Q8_0"
        assert tensor.tensor_type.name == kept, name
        np.testing.assert_allclose(values(tensor), exact[name], rtol=0, atol=np.abs(exact[name]).max() * 2.0**-7)
    with pytest.raises(pydflash.ArgumentError, match="matrix_type is 'q4_0'; it must be 'q8_0'"):
        convert(tmp_path / "d", tmp_path / "out.gguf", matrix_type="q4_0")


def test_default_taps_are_spread_over_the_target(tmp_path: Path) -> None:
    for n_layer, n_target, taps in ((5, 64, (1, 16, 31, 46, 61)), (5, 32, (1, 8, 15, 22, 29)), (1, 64, (32,))):
        draft = TinyDraft(n_layer=n_layer, n_target_layers=n_target, target_ids=taps)
        folder = draft.write_folder(tmp_path / f"{n_layer}-{n_target}")
        edit_config(folder, lambda config: config["dflash_config"].pop("target_layer_ids"))
        convert(folder, tmp_path / "out.gguf")
        assert read(tmp_path / "out.gguf")[0]["dflash.target_layers"] == [tap + 1 for tap in taps]


def test_layers_past_max_window_layers_slide(tmp_path: Path) -> None:
    folder = TinyDraft(n_layer=3, sliding_window=9).write_folder(tmp_path / "d")
    edit_config(folder, lambda config: (config.pop("layer_types"), config.update(max_window_layers=2)))
    convert(folder, tmp_path / "out.gguf")
    keys = read(tmp_path / "out.gguf")[0]
    assert keys["dflash.attention.sliding_window"] == 9
    assert keys["dflash.attention.sliding_window_pattern"] == [False, False, True]


def test_shards(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "whole.gguf")
    weights = TinyDraft().hf_weights()
    (folder / "model.safetensors").unlink()
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for shard in set(names.values()):
        write_safetensors(folder / shard, {name: data for name, data in weights.items() if names[name] == shard})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    convert(folder, tmp_path / "sharded.gguf")
    assert (tmp_path / "sharded.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()

    index.write_text(json.dumps({"weight_map": names | {"more.weight": names["fc.weight"]}}))
    with pytest.raises(pydflash.ModelFormatError, match=r"more\.weight, which no shard has"):
        convert(folder, tmp_path / "x.gguf")
    index.write_text(json.dumps({"weight_map": {"fc.weight": "../drafter/config.json"}}))
    with pytest.raises(pydflash.ModelFormatError, match="not beside it"):
        convert(folder, tmp_path / "x.gguf")
    index.write_text(json.dumps({"weight_map": {"fc.weight": "nowhere.safetensors"}}))
    with pytest.raises(pydflash.ModelFileError, match="nowhere"):
        convert(folder, tmp_path / "x.gguf")


def test_the_targets_tokenizer_is_copied(tiny_target: Path, folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "out.gguf", target=tiny_target)
    ours, target = read(tmp_path / "out.gguf")[0], read(tiny_target)[0]
    tokenizer = {name for name in target if name.startswith("tokenizer.")}
    assert len(tokenizer) >= 6
    assert {name: ours[name] for name in tokenizer} == {name: target[name] for name in tokenizer}
    assert ours["tokenizer.ggml.mask_token_id"] == TinyDraft().mask_token_id
    assert ours["dflash.rope.dimension_sections"] == [TinyDraft().head_dim // 2, 0, 0, 0]


def test_another_targets_drafter(folder: Path, tmp_path: Path) -> None:
    wide = TinyTarget(n_embd=128).write(tmp_path / "wide.gguf")
    with pytest.raises(pydflash.DraftMismatchError, match="128 wide"):
        convert(folder, tmp_path / "out.gguf", target=wide)
    flat = TinyTarget(n_layer=2, recurrent=(True, False)).write(tmp_path / "flat.gguf")
    with pytest.raises(pydflash.DraftMismatchError, match="2 layers"):
        convert(folder, tmp_path / "out.gguf", target=flat)
    assert not (tmp_path / "out.gguf").exists()


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "dflash2": (lambda c: c["dflash_config"].update(conv_kernel_size=4), "DFlash2"),
    "dflash2-name": (lambda c: c.update(architectures=["DFlash2DraftModel"]), "DFlash2"),
    "dspark": (lambda c: c.update(architectures=["Qwen3DSparkModel"]), "DSpark"),
    "markov": (lambda c: c.update(markov_rank=8), "DSpark"),
    "other": (lambda c: c.update(architectures=["LlamaForCausalLM"]), "LlamaForCausalLM"),
    "nameless": (lambda c: c.pop("architectures"), "architectures is None"),
    "gelu": (lambda c: c.update(hidden_act="gelu"), "gelu"),
    "bias": (lambda c: c.update(attention_bias=True), "attention_bias"),
    "yarn": (lambda c: c.update(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "yarn"),
    "use_swa": (lambda c: c["dflash_config"].update(use_swa=True), "use_swa"),
}

MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no-width": (lambda c: c.pop("hidden_size"), "hidden_size is None"),
    "huge": (lambda c: c.update(num_hidden_layers=2**40), "num_hidden_layers is 1099511627776"),
    "negative": (lambda c: c.update(num_attention_heads=-4), "num_attention_heads is -4"),
    "text": (lambda c: c.update(rms_norm_eps="small"), "rms_norm_eps is 'small'"),
    "flag": (lambda c: c.update(head_dim=True), "head_dim is True"),
    "no-mask": (lambda c: c["dflash_config"].pop("mask_token_id"), "mask_token_id is None"),
    "no-theta": (lambda c: c.pop("rope_theta"), "rope_theta is None"),
    "no-taps": (lambda c: c["dflash_config"].update(target_layer_ids=[]), "target_layer_ids is"),
    "high-tap": (lambda c: c["dflash_config"].update(target_layer_ids=[0, 4]), "past num_target_layers 4"),
    "kinds": (lambda c: c.update(layer_types=["full_attention"]), "layer_types"),
    "list": (lambda c: c.update(dflash_config=[1]), "dflash_config is not an object"),
    "width": (lambda c: c.update(hidden_size=32), "has shape"),
    "layers": (lambda c: c.update(num_hidden_layers=3, layer_types=None), r"lack layers\.2\."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_plain_dflash_is_refused(case: str, folder: Path, tmp_path: Path) -> None:
    change, sentence = REFUSED[case]
    edit_config(folder, change)
    with pytest.raises(pydflash.UnsupportedModelError, match=sentence):
        convert(folder, tmp_path / "out.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drafter"]


@pytest.mark.parametrize("case", MALFORMED)
def test_a_wrong_config_is_named(case: str, folder: Path, tmp_path: Path) -> None:
    change, sentence = MALFORMED[case]
    edit_config(folder, change)
    with pytest.raises(pydflash.ModelFormatError, match=sentence):
        convert(folder, tmp_path / "out.gguf")


def test_an_unknown_tensor_is_refused(folder: Path, tmp_path: Path) -> None:
    extra = np.zeros((4, 4), np.float32)
    write_safetensors(folder / "model.safetensors", TinyDraft().hf_weights() | {"candidate_selector.x": extra})
    with pytest.raises(pydflash.UnsupportedModelError, match=r"candidate_selector\.x"):
        convert(folder, tmp_path / "out.gguf")


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(pydflash.ModelFileError, match="is not a folder"):
        convert(tmp_path / "nowhere", tmp_path / "out.gguf")
    with pytest.raises(pydflash.ModelFileError, match=r"cannot write .*No such file"):
        convert(folder, tmp_path / "no" / "such" / "out.gguf")
    (folder / "model.safetensors").unlink()
    with pytest.raises(pydflash.ModelFileError, match=r"model\.safetensors"):
        convert(folder, tmp_path / "out.gguf")
    (folder / "config.json").write_text("{")
    with pytest.raises(pydflash.ModelFormatError, match="is not JSON"):
        convert(folder, tmp_path / "out.gguf")


def bent_headers() -> Iterator[tuple[str, bytes]]:
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}

    def header(**change: Any) -> bytes:
        text = json.dumps({"fc.weight": entry | change}).encode()
        return struct.pack("<Q", len(text)) + text + bytes(16)

    yield "empty", b""
    yield "short", bytes(7)
    yield "long-header", struct.pack("<Q", 2**63) + b"{}"
    yield "no-json", struct.pack("<Q", 2) + b"{]"
    yield "deep-json", struct.pack("<Q", 200_000) + b"[" * 200_000
    yield "list", struct.pack("<Q", 2) + b"[]"
    yield "past-end", header(data_offsets=[0, 2**62])
    yield "backwards", header(data_offsets=[16, 0])
    yield "negative", header(data_offsets=[-16, 0])
    yield "float", header(data_offsets=[0, 16.0])
    yield "wraps", header(shape=[2**32, 2**32])
    yield "dtype", header(dtype="F99")
    yield "shape", header(shape="2")
    yield "no-offsets", header(data_offsets=None)
    yield "entry", struct.pack("<Q", 15) + b'{"fc.weight":1}'


@pytest.mark.parametrize("raw", [pytest.param(raw, id=name) for name, raw in bent_headers()])
def test_malformed_safetensors(raw: bytes, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(pydflash.ModelFormatError, match=r"model\.safetensors|lack"):
        convert(folder, tmp_path / "out.gguf")


def test_truncated_safetensors(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    for size in (*range(0, 64, 7), len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:size])
        with pytest.raises(pydflash.ModelFormatError):
            convert(folder, tmp_path / "out.gguf")


def test_a_failure_leaves_the_old_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(pydflash.ModelFileError, match="No space left"):
        convert(folder, out)
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drafter", "out.gguf"]


def test_command_line(folder: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pydflash.convert", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run(folder, tmp_path / "out.gguf")
    assert (done.returncode, done.stderr) == (0, "")
    assert "dflash.block_size" in read(tmp_path / "out.gguf")[0]
    failed = run(tmp_path / "nowhere", tmp_path / "out2.gguf")
    assert failed.returncode == 1
    assert failed.stderr == f"error: {tmp_path / 'nowhere'} is not a folder\n"


def test_a_session_drafts_the_same_from_folder_and_file(tiny_target: Path, tmp_path: Path) -> None:
    draft = TinyDraft.of(TinyTarget(), layer_types=SLIDING, sliding_window=6)
    ids = list(range(40, 60))
    with pydflash.Session(tiny_target, draft.write(tmp_path / "d.gguf"), n_threads=1) as session:
        expected = session.draft_logits(ids)
    with pydflash.Session(tiny_target, draft.write_folder(tmp_path / "d"), n_threads=1) as session:
        assert np.array_equal(session.draft_logits(ids), expected)


def test_conversions_are_cached_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = TinyDraft().write_folder(tmp_path / "d")
    first = cached_draft(folder)
    assert first.parent.parent == cache_folder() == tmp_path / "cache" / "pydflash"
    made = first.stat().st_mtime_ns
    assert cached_draft(folder) == first
    assert cached_draft(TinyDraft().write_folder(tmp_path / "copy")) == first
    assert first.stat().st_mtime_ns == made
    TinyDraft(seed=1).write_folder(folder)
    assert cached_draft(folder) != first


def test_a_cache_that_cannot_be_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "file"))
    with pytest.raises(pydflash.ModelFileError, match="set XDG_CACHE_HOME"):
        cached_draft(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "cache"))
    with pytest.raises(pydflash.ModelFileError, match="not a drafter's folder"):
        cached_draft(tmp_path)
