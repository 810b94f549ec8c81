"""Model files that are well-formed GGUF but not a model: every key and tensor of a target and a drafter broken in turn.

Each must open, or be refused with a sentence that names what is wrong, quickly and without a signal.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydflash
from pydflash import DraftMismatchError, ModelFormatError, PydflashError, UnsupportedModelError
from tests.tiny_models import TinyDraft, TinyTarget, write_gguf

TARGET = TinyTarget(n_layer=2, interval=2, mtp=True)
DRAFT = TinyDraft.of(TARGET, target_ids=(0,), layer_types=("sliding_attention", "full_attention"), sliding_window=12)
BROKEN_VALUES = [
    0,
    1,
    2,
    -1,
    3,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**64 - 1,
    0.0,
    -1.0,
    1e30,
    "",
    "text",
    True,
    ["a"],
    [1],
]


def add(writer_keys: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = np.int64(value) if value < 2**63 else np.uint64(value)
    return {**writer_keys, key: value}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("good")
    return TARGET.write(folder / "target.gguf"), DRAFT.write(folder / "draft.gguf")


def attempt(target: Path, draft: Path | None) -> str | None:
    """Opens and runs; the refusal's sentence, or None. A second is enough for either."""
    start = time.perf_counter()
    try:
        with pydflash.Session(target, draft, n_ctx=64, n_ring=512, n_threads=1) as session:
            session.generate([1, 2, 3], max_tokens=6, seed=1)
        message = None
    except PydflashError as error:
        message = str(error)
        assert len(message) > 20
    assert time.perf_counter() - start < 5  # far below on a quiet machine
    return message


def test_the_unbroken_pair_runs(good: tuple[Path, Path]) -> None:
    assert attempt(*good) is None


@pytest.mark.parametrize("key", sorted(TARGET.gguf_keys()))
def test_every_target_key(key: str, tmp_path: Path) -> None:
    refused = 0
    tensors = TARGET.tensors()
    without = {k: v for k, v in TARGET.gguf_keys().items() if k != key}
    variants = [without, *(add(without, key, value) for value in BROKEN_VALUES)]
    for i, keys in enumerate(variants):
        path = write_gguf(tmp_path / f"{i}.gguf", "qwen35", keys, tensors)
        message = attempt(path, None)
        path.unlink()
        refused += message is not None
    assert refused >= 6


@pytest.mark.parametrize("key", sorted(DRAFT.gguf_keys().keys() - {"dflash.context_length"}))  # which nothing reads
def test_every_drafter_key(key: str, good: tuple[Path, Path], tmp_path: Path) -> None:
    refused = 0
    tensors = DRAFT.tensors()
    without = {k: v for k, v in DRAFT.gguf_keys().items() if k != key}
    variants = [without, *(add(without, key, value) for value in BROKEN_VALUES)]
    for i, keys in enumerate(variants):
        path = write_gguf(tmp_path / f"{i}.gguf", "dflash", keys, tensors)
        message = attempt(good[0], path)
        path.unlink()
        refused += message is not None
    assert refused >= 4


def broken_tensors(tensors: dict[str, Any], name: str) -> list[dict[str, Any]]:
    data = tensors[name]
    changed: list[Callable[[Any], Any]] = [
        lambda x: np.concatenate([x, x], axis=0),
        lambda x: np.concatenate([x, x], axis=-1),
        lambda x: x.reshape(1, *x.shape[:-1], x.shape[-1]) if x.ndim == 1 else x.reshape(-1),
        lambda x: x[..., : max(1, x.shape[-1] // 2)],
    ]
    out = [{k: v for k, v in tensors.items() if k != name}]
    for change in changed:
        new = np.ascontiguousarray(change(data))
        if new.reshape(-1).shape != data.reshape(-1).shape or new.squeeze().shape != data.squeeze().shape:
            out.append({**tensors, name: new})
    return out


def test_every_target_tensor(tmp_path: Path) -> None:
    tensors = TARGET.tensors()
    for name in tensors:
        if name.startswith(f"blk.{TARGET.n_layer}."):
            continue  # the MTP block, which is skipped
        for variant in broken_tensors(tensors, name):
            message = attempt(write_gguf(tmp_path / "t.gguf", "qwen35", TARGET.gguf_keys(), variant), None)
            if name == "output.weight" and name not in variant:
                assert message is None  # tied
            elif name == "token_embd.weight" and name in variant and variant[name].shape[-1] == TARGET.n_embd:
                assert message is not None
                assert "output" in message
            else:
                assert message is not None, name
                assert name in message


def test_every_drafter_tensor(good: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = DRAFT.tensors()
    for name in tensors:
        for variant in broken_tensors(tensors, name):
            path = write_gguf(tmp_path / "d.gguf", "dflash", DRAFT.gguf_keys(), variant)
            message = attempt(good[0], path)
            assert message is not None, name
            assert name in message


def test_types_that_are_no_weights(tmp_path: Path) -> None:
    tensors: dict[str, Any] = dict(TARGET.tensors())
    tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"].astype(np.float16)
    path = write_gguf(tmp_path / "f16.gguf", "qwen35", TARGET.gguf_keys(), tensors, types={"ffn_up": "f16"})
    assert attempt(path, None) is None
    half = dict(TARGET.tensors())
    half["blk.0.attn_norm.weight"] = half["blk.0.attn_norm.weight"].reshape(1, -1)
    path = write_gguf(tmp_path / "norm.gguf", "qwen35", TARGET.gguf_keys(), half, types={"attn_norm": "f16"})
    message = attempt(path, None)
    assert message is not None
    assert "attn_norm" in message
    assert "F32" in message


def test_a_vocabulary_of_another_size(tmp_path: Path) -> None:
    path = TinyTarget(n_vocab=300).write(tmp_path / "t.gguf", tokenizer=True)
    keys = TinyTarget(n_vocab=300).gguf_keys() | {"tokenizer.ggml.tokens": ["a", "b", "c"]}
    broken = write_gguf(tmp_path / "b.gguf", "qwen35", keys, TinyTarget(n_vocab=300).tensors())
    assert attempt(path, None) is None
    with pytest.raises(ModelFormatError, match=r"lists 3 tokens, but tensor 'token_embd\.weight' has 300"):
        pydflash.Session(broken)


def test_wrong_architectures_say_what_to_do(good: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="pass it as draft"):
        pydflash.Session(good[1])
    with pytest.raises(UnsupportedModelError, match="'qwen35' is not a drafter"):
        pydflash.Session(good[0], good[0])
    other = write_gguf(tmp_path / "llama.gguf", "llama", {}, {"x": np.zeros(4, np.float32)})
    with pytest.raises(UnsupportedModelError, match="'llama'"):
        pydflash.Session(other)


def test_a_drafter_of_another_target(good: tuple[Path, Path], tmp_path: Path) -> None:
    wide = TinyTarget(n_embd=128)
    with pytest.raises(DraftMismatchError, match="128 wide and the target 64"):
        pydflash.Session(good[0], TinyDraft.of(wide).write(tmp_path / "wide.gguf"))
    deep = TinyDraft.of(TinyTarget(n_layer=8))
    with pytest.raises(DraftMismatchError, match="names layer 7, but the target has 2"):
        pydflash.Session(good[0], deep.write(tmp_path / "deep.gguf"))
    mask = TinyDraft.of(TARGET, target_ids=(0,), mask_token_id=5000)
    with pytest.raises(DraftMismatchError, match="mask token is 5000"):
        pydflash.Session(good[0], mask.write(tmp_path / "mask.gguf"))
    keys = DRAFT.gguf_keys() | {"dflash.conv_kernel_size": 4}
    newer = write_gguf(tmp_path / "2.gguf", "dflash", keys, DRAFT.tensors())
    with pytest.raises(UnsupportedModelError, match="DFlash2"):
        pydflash.Session(good[0], newer)


def test_a_drafter_deeper_than_its_target(good: tuple[Path, Path], tmp_path: Path) -> None:
    draft = TinyDraft.of(TARGET, target_ids=(0,), n_layer=60, n_ff=32)
    assert attempt(good[0], draft.write(tmp_path / "deep.gguf")) is None


def test_models_of_one_kind_of_layer(tmp_path: Path) -> None:
    for recurrent in (True, False):
        target = TinyTarget(n_layer=3, recurrent=(recurrent,) * 3)
        path = target.write(tmp_path / "t.gguf")
        draft = TinyDraft.of(target, target_ids=(0, 1), block_size=4).write(tmp_path / "d.gguf")
        with pydflash.Session(path, draft, kv_type="f32", n_threads=1) as session:
            ids = list(range(5, 40))
            assert session.generate(ids, max_tokens=40).ids == session.generate(ids, max_tokens=40, budget=0).ids


def test_layers_asked_for_twice(good: tuple[Path, Path]) -> None:
    with pydflash.Session(*good, n_ctx=64, n_ring=512, n_threads=1) as session:
        assert session.hidden([1, 2, 3], [0, 2]).shape == (3, 2, TARGET.n_embd)
        with pytest.raises(PydflashError, match="twice"):
            session.hidden([1, 2, 3], [1] * 2000)


def test_ties_go_to_the_lowest_id(tmp_path: Path) -> None:
    tensors = dict(TARGET.tensors())
    tensors["output.weight"] = np.tile(tensors["output.weight"][:1], (TARGET.n_vocab, 1))
    path = write_gguf(tmp_path / "tied.gguf", "qwen35", TARGET.gguf_keys(), tensors)
    with pydflash.Session(path, n_ctx=64, n_threads=1) as session:
        assert session.generate([1, 2], max_tokens=3).ids == [0, 0, 0]


def test_one_logit_that_is_not_a_number(tmp_path: Path) -> None:
    tensors = dict(TARGET.tensors())
    tensors["output.weight"] = tensors["output.weight"].copy()
    tensors["output.weight"][7] = np.nan
    path = write_gguf(tmp_path / "nan.gguf", "qwen35", TARGET.gguf_keys(), tensors)
    with (
        pydflash.Session(path, n_ctx=64, n_threads=1) as session,
        pytest.raises(PydflashError, match=r"finite|not a number|NaN"),
    ):
        session.generate([1, 2], max_tokens=4)


def test_weights_that_are_not_finite_end_in_a_sentence(tmp_path: Path) -> None:
    tensors = dict(TARGET.tensors())
    tensors["output_norm.weight"] = np.full_like(tensors["output_norm.weight"], np.nan)
    with (
        pydflash.Session(write_gguf(tmp_path / "nan.gguf", "qwen35", TARGET.gguf_keys(), tensors), n_ctx=64) as session,
        pytest.raises(PydflashError, match="not finite"),
    ):
        session.generate([1, 2], max_tokens=4)


def test_a_drafter_whose_weights_are_not_finite_ends_in_a_sentence(tmp_path: Path) -> None:
    draft = TinyDraft.of(TARGET)
    tensors = dict(draft.tensors())
    tensors["output_norm.weight"] = np.full_like(tensors["output_norm.weight"], np.inf)
    path = write_gguf(tmp_path / "inf.gguf", "dflash", draft.gguf_keys(), tensors)
    with pydflash.Session(TARGET.write(tmp_path / "target.gguf"), path, n_ctx=64, n_threads=1) as session:
        with pytest.raises(PydflashError, match=r"the drafter produced logits that are not finite"):
            session.generate([1, 2], max_tokens=4)
        assert session.generate([1, 2], max_tokens=4, budget=0).ids  # the target's are
