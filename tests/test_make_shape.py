"""scripts/make_shape.py: the 27B's headers against its published numbers, real values in a small shape, refusals."""

from __future__ import annotations

import collections
import json
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

import pydflash
from pydflash.bench.answers import parted
from tests.scripts import load_script

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_shape.py"


@pytest.fixture(scope="module")
def make_shape() -> ModuleType:
    return load_script("scripts/make_shape.py")


@pytest.fixture
def small(make_shape: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with one more shape, small enough to fill."""
    shape = make_shape.Shape("Small", 8, 256, 512, 4, 16, False, 2, 256, 16, (2, 6), 500)
    monkeypatch.setattr(make_shape, "N_VOCAB", 512)
    monkeypatch.setitem(make_shape.SHAPES, "small", shape)
    monkeypatch.setitem(make_shape.SHAPES, "tied", make_shape.Shape(**{**vars(shape), "tied": True}))
    return make_shape


def read(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    reader = gguf.GGUFReader(path)
    keys = {name: entry.contents() for name, entry in reader.fields.items()}
    return keys, {tensor.name: tensor for tensor in reader.tensors}


# Of the 27B's config.json; GGUF's spelling.
KEYS_27B = {
    "general.architecture": "qwen35",
    "general.file_type": 15,  # Q4_K_M
    "qwen35.vocab_size": 248320,
    "qwen35.block_count": 64,
    "qwen35.context_length": 262144,
    "qwen35.embedding_length": 5120,
    "qwen35.feed_forward_length": 17408,
    "qwen35.attention.head_count": 24,
    "qwen35.attention.head_count_kv": 4,
    "qwen35.attention.key_length": 256,
    "qwen35.rope.freq_base": 1e7,
    "qwen35.rope.dimension_count": 64,
    "qwen35.rope.dimension_sections": [11, 11, 10, 0],
    "qwen35.ssm.inner_size": 6144,
    "qwen35.ssm.time_step_rank": 48,
    "qwen35.ssm.group_count": 16,
    "qwen35.ssm.state_size": 128,
}


def test_the_27b(make_shape: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_shape.main(["--shape", "27b", "--out", str(tmp_path), "--sparse"]) == 0
    assert capsys.readouterr().out.count("sparse") == 2
    target, draft = tmp_path / "target.gguf", tmp_path / "draft.gguf"
    assert target.stat().st_size == pytest.approx(16.5e9, rel=0.01)
    assert draft.stat().st_size == pytest.approx(3.46e9, rel=0.001)
    assert (target.stat().st_blocks + draft.stat().st_blocks) * 512 < 1 << 20, "the holes take room on disk"

    keys, tensors = read(target)
    assert {name: keys[name] for name in KEYS_27B} == KEYS_27B
    assert "tokenizer.ggml.tokens" not in keys
    shapes = {name: (tuple(map(int, t.shape)), t.tensor_type.name) for name, t in tensors.items()}
    assert shapes["token_embd.weight"] == ((5120, 248320), "Q4_K")
    assert shapes["output.weight"] == ((5120, 248320), "Q6_K")
    assert shapes["blk.0.attn_qkv.weight"] == ((5120, 10240), "Q6_K")  # the first eighth of the layers
    assert shapes["blk.8.attn_qkv.weight"] == ((5120, 10240), "Q4_K")
    assert shapes["blk.10.attn_qkv.weight"] == ((5120, 10240), "Q6_K")  # every third from there
    assert shapes["blk.11.attn_v.weight"] == ((5120, 1024), "Q4_K")
    assert shapes["blk.19.attn_v.weight"] == ((5120, 1024), "Q6_K")
    assert shapes["blk.11.attn_q.weight"] == ((5120, 2 * 24 * 256), "Q4_K")
    assert shapes["blk.56.ffn_down.weight"] == ((17408, 5120), "Q6_K")  # the last eighth
    assert shapes["blk.9.ffn_down.weight"] == ((17408, 5120), "Q4_K")
    assert shapes["blk.0.ssm_conv1d.weight"] == ((4, 10240), "F32")
    kinds = collections.Counter(kind for _, kind in shapes.values())
    assert kinds["Q6_K"] == 1 + 2 * 32  # the head; ffn_down and the values of half of the layers

    keys, tensors = read(draft)
    assert (keys["dflash.block_size"], keys["dflash.target_layers"]) == (16, [2, 17, 32, 47, 62])
    assert tuple(tensors["fc.weight"].shape) == (5 * 5120, 5120)
    assert {t.tensor_type.name for t in tensors.values()} == {"BF16", "F32"}


@pytest.mark.parametrize(("shape", "n_params"), [("27b", 26.9e9), ("9b", 8.95e9), ("4b", 4.2e9)])
def test_the_loader_takes_every_shape(make_shape: ModuleType, shape: str, n_params: float, tmp_path: Path) -> None:
    assert make_shape.main(["--shape", shape, "--out", str(tmp_path), "--sparse", "--draft-type", "q8_0"]) == 0
    plan = pydflash.plan(tmp_path / "target.gguf", tmp_path / "draft.gguf", n_ctx=4096, vram="1000GiB")
    tensors = read(tmp_path / "target.gguf")[1]
    assert sum(int(t.n_elements) for t in tensors.values()) == pytest.approx(n_params, rel=0.01)
    assert plan.n_ctx == 4096
    assert plan.fits
    drafted = sum(int(t.n_elements) for t in read(tmp_path / "draft.gguf")[1].values())
    assert plan.mib["drafter weights"] * 2**23 / drafted == pytest.approx(8.5, rel=0.001)


@pytest.mark.parametrize("shape", ["small", "tied"])
def test_values(small: ModuleType, shape: str, tmp_path: Path) -> None:
    def files(folder: str, *options: str) -> list[bytes]:
        assert small.main(["--shape", shape, "--out", str(tmp_path / folder), *options]) == 0
        return [(tmp_path / folder / name).read_bytes() for name in ("target.gguf", "draft.gguf")]

    first = files("a")
    assert first == files("b"), "the same seed gives the same bytes"
    assert first[0] != files("c", "--seed", "1")[0]
    wanted = {t.name: t for t in small.target_tensors(small.SHAPES[shape])}
    for name, tensor in read(tmp_path / "a" / "target.gguf")[1].items():
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        scale = wanted[name].scale
        if isinstance(scale, tuple):
            assert scale[0] <= values.min(), name
            assert values.max() <= scale[1], name
        else:
            assert values.std() == pytest.approx(scale, rel=0.1), name
            if values.size > 1 << 17:  # a block's values share its random scales
                assert abs(values.mean()) < 0.1 * scale, name
    for name, tensor in read(tmp_path / "a" / "draft.gguf")[1].items():
        if len(tensor.shape) == 2:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert 0.4 < values.std() * float(tensor.shape[0]) ** 0.5 < 1.6, name

    with pydflash.Session(tmp_path / "a" / "target.gguf", tmp_path / "a" / "draft.gguf", n_ctx=128, n_threads=1) as s:
        logits = s.logits(range(20))
        assert np.isfinite(logits).all()
        assert (logits.std(1) > 0.5).all()
        assert (logits.std(1) < 10).all()
        plain = s.generate([1, 2, 3], max_tokens=6, budget=0).ids
        tree = s.generate([1, 2, 3], max_tokens=6, budget=15).ids
        n = parted(plain, tree)
        if n is not None:  # K-quants round what they multiply to 8 bits: the last bit of a sum may move a logit by 0.15
            row = s.logits([1, 2, 3, *plain[:n]])[-1]
            assert abs(row[plain[n]] - row[tree[n]]) < 0.3
            assert min(row[plain[n]], row[tree[n]]) > row.max() - 0.3
        assert s.tokenizer is None


def test_bf16_and_fewer_layers(small: ModuleType, tmp_path: Path) -> None:
    command = ["--shape", "small", "--out", str(tmp_path), "--target-type", "bf16", "--layers", "4"]
    assert small.main(command) == 0
    keys, tensors = read(tmp_path / "target.gguf")
    assert (keys["general.name"], keys["general.file_type"]) == ("Small (4 of 8 layers) shape, random weights", 32)
    assert (keys["qwen35.block_count"], keys["pydflash.shape.layers"]) == (4, 8)
    assert {t.tensor_type.name for t in tensors.values()} == {"BF16", "F32"}
    assert {name.split(".")[1] for name in tensors if name.startswith("blk.")} == set("0123")
    assert read(tmp_path / "draft.gguf")[0]["dflash.target_layers"] == [1, 3]
    with pydflash.Session(tmp_path / "target.gguf", tmp_path / "draft.gguf", n_ctx=128, n_threads=1) as s:
        assert 0.5 < s.logits(range(20)).std() < 10
        assert s.generate([1, 2, 3], max_tokens=6, budget=7).stats.n_generated == 6

    layers = []  # the fourth of the whole and of the cut
    for n_layer in ("8", "4"):
        assert small.main(["--shape", "small", "--out", str(tmp_path), "--sparse", "--force", "--layers", n_layer]) == 0
        tensors = read(tmp_path / "target.gguf")[1]
        layers.append({name: tuple(t.shape) for name, t in tensors.items() if name.startswith("blk.3.")})
    assert layers[0] == layers[1]
    for wrong in ("0", "6", "12"):
        with pytest.raises(SystemExit):
            small.main([*command[:-1], wrong])


def test_costs_of_a_cut_shape(
    small: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of pass is made; the whole has as many bytes to read as its file has, embeddings aside."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    costs = load_script("scripts/shape_costs.py")
    size = {}
    for layers in ("8", "4"):
        folder = tmp_path / layers
        assert small.main(["--shape", "small", "--out", str(folder), "--target-type", "bf16", "--layers", layers]) == 0
        tensors = read(folder / "target.gguf")[1]
        size[layers] = sum(int(t.n_bytes) for name, t in tensors.items() if name != "token_embd.weight")
    assert costs.whole(tmp_path / "8" / "target.gguf") == ("Small shape, random weights, BF16", 1.0)
    name, more = costs.whole(tmp_path / "4" / "target.gguf")
    assert name == "Small (4 of 8 layers) shape, random weights, BF16"
    assert more == pytest.approx(size["8"] / size["4"])
    capsys.readouterr()
    assert costs.main([str(tmp_path / "4"), "--threads", "1", "--passes", "2", "--n-prompt", "16"]) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if " node" in line]
    assert [row[1].strip() for row in rows] == list(costs.ARMS)
    for row in rows:  # a longer pass of the whole takes longer by its target's part
        drafting, ms, of_whole = (float(row[i]) for i in (2, 3, 6))
        assert of_whole == pytest.approx(drafting + more * (ms - drafting), abs=0.2)


def test_a_vocabulary(small: ModuleType, tmp_path: Path) -> None:
    """Every byte is a token, spelt as GPT-2 spells it; the weights are what they are without."""
    for folder, options in (("a", []), ("b", ["--vocab"])):
        assert small.main(["--shape", "small", "--out", str(tmp_path / folder), *options]) == 0
    for name in ("target.gguf", "draft.gguf"):
        (_, plain), (keys, tensors) = (read(tmp_path / folder / name) for folder in "ab")
        assert all((tensors[t].data == plain[t].data).all() for t in plain)
        assert len(keys["tokenizer.ggml.tokens"]) == 512
    with pydflash.Session(tmp_path / "b" / "target.gguf", tmp_path / "b" / "draft.gguf", n_ctx=128, n_threads=1) as s:
        assert s.tokenize("a   ö") == [97, 256, 32, *"ö".encode()]
        assert s.detokenize([97, 256, 32, *"ö".encode()]) == "a   ö"


def test_refusals(
    small: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run = ["--shape", "small", "--out", str(out)]
    assert small.main(run) == 0
    written = (out / "target.gguf").read_bytes()
    assert small.main([*run, "--seed", "1"]) == 1
    assert "target.gguf" in capsys.readouterr().err
    assert (out / "target.gguf").read_bytes() == written
    assert small.main([*run, "--seed", "1", "--force"]) == 0
    assert (out / "target.gguf").read_bytes() != written

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert small.main([*run, "--force"]) == 1
    assert "GB free and the pair needs" in capsys.readouterr().err
    monkeypatch.undo()

    (tmp_path / "file").write_text("in the way")
    assert small.main(["--shape", "27b", "--sparse", "--out", str(tmp_path / "file")]) == 1
    assert "File exists" in capsys.readouterr().err
    for wrong in (["--shape", "7b", "--out", "x"], ["--shape", "4b"], [*run, "--seed", "-1"], [*run, "--frobnicate"]):
        with pytest.raises(SystemExit) as stop:
            small.main(wrong)
        assert stop.value.code == 2


def test_nothing_half_written_stays(small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(small, "values", full)
    assert small.main(["--shape", "small", "--out", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_plan_of_the_27b_fits_a_24_gb_card(
    make_shape: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The design's figures: 128K within 23,000 MiB; 256K within what a 3090 has once its driver is up, 24,240 MiB."""
    from pydflash.__main__ import main

    def plan(*options: str) -> dict[str, Any]:
        command = ["plan", "--target", str(tmp_path / "target.gguf"), "--draft", str(tmp_path / "draft.gguf"), "--json"]
        main([*command, "--kv-type", "q4_0", "--budget", "22", "--vram", "24240MiB", *options])
        return dict(json.loads(capsys.readouterr().out))

    make_shape.main(["--shape", "27b", "--out", str(tmp_path), "--sparse"])
    capsys.readouterr()
    at_128k = plan("--n-ctx", "131072")
    assert at_128k["total"] < 23000
    assert at_128k["settings"]["fits"]
    assert at_128k["KV cache"] == pytest.approx(2304, abs=6)  # 18 KiB a token, and 64 rows for a tree
    # 4 KiB a row, some of it where tensors of other moments lie
    assert 400 < at_128k["flash attention's f16 copy of K and V"] <= 513
    assert not plan("--n-ctx", "262144")["settings"]["fits"]  # with the drafter in BF16 it does not

    make_shape.main(["--shape", "27b", "--out", str(tmp_path), "--sparse", "--force", "--draft-type", "q8_0"])
    capsys.readouterr()
    assert plan("--n-ctx", "262144", "--n-batch", "128")["total"] < 24240
