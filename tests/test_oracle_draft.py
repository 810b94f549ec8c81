"""The drafter against the dflash package's DFlashDraftModel: the logits of one block, on random small models.

tests/oracles/draft.npz holds the expected values; scripts/make_oracles.py made them (its origin entry says with what).

What that model does, as read from its source and probed by gradients. n is the position of the pending token, which is
slot 0 of the block; slot s stands at n + s, context j at j < n. A query at p sees a key at k when all of these hold:
    causal layer: k <= p            causal = is_causal if config.json has it (for all layers alike, full ones too),
                                    else the layer slides
    sliding layer: p - k < W        W positions with its own; the window moves with the slot
    sliding, not causal: k - p < W  the window is symmetric then
A layer called sliding in a config without a live window sees everything, yet is causal in the block.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import pydflash
from pydflash.convert import convert
from tests.oracles import cases
from tests.tiny_models import F32

# Of the largest expected value. With an f32 KV cache all of drafting is f32. Else the target's features are kept as
# bfloat16 and the drafter's keys and values as f16; there the reference's features are rounded too.
TOLERANCE = 1e-4
TOLERANCE_OF_HALVES = 1e-2


class Expected:
    """The vectors of one prompt, after a check that they were made for the models the test is about to write."""

    def __init__(self, name: str, n: int) -> None:
        case = cases.DRAFT_CASES[name]
        with np.load(cases.DRAFT_FILE) as file:
            self.ids: npt.NDArray[np.int32] = file[f"{name}.{n}.ids"]
            self.logits: F32 = file[f"{name}.{n}.logits"]  # [block - 1, n_vocab]
            self.logits_bf16_features: F32 = file[f"{name}.{n}.logits_bf16_features"]
            weights = str(file[f"{name}.weights"])
        current = cases.fingerprint(case.target.hf_weights(), case.draft.hf_weights())
        assert weights == current, f"{name}: the models changed, {cases.REMAKE}"


def worst(found: F32, expected: F32) -> float:
    """Largest difference in units of the largest expected value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def check(session: pydflash.Session, name: str) -> None:
    case = cases.DRAFT_CASES[name]
    for n in case.n_tokens:
        expected = Expected(name, n)
        found = session.draft_logits(expected.ids)
        assert found.shape == (case.draft.block_size - 1, case.target.n_vocab)
        assert found.dtype == np.float32
        assert worst(found, expected.logits) < TOLERANCE, f"{name}, {n} tokens"


def open_pair(target: Path, draft: Path) -> pydflash.Session:
    return pydflash.Session(target, draft, kv_type="f32", n_threads=1)


@pytest.mark.parametrize("name", cases.DRAFT_CASES)
def test_draft_logits_are_those_of_the_dflash_package(name: str, tmp_path: Path) -> None:
    case = cases.DRAFT_CASES[name]
    target = case.target.write(tmp_path / "target.gguf")
    with open_pair(target, case.draft.write(tmp_path / "draft.gguf")) as session:
        check(session, name)


@pytest.mark.parametrize("name", cases.DRAFT_CASES)
def test_a_converted_folder_drafts_the_same(name: str, tmp_path: Path) -> None:
    case = cases.DRAFT_CASES[name]
    target = case.target.write(tmp_path / "target.gguf")
    convert(case.draft.write_folder(tmp_path / "draft"), tmp_path / "draft.gguf")
    with open_pair(target, tmp_path / "draft.gguf") as session:
        check(session, name)


def test_bf16_folder_stays_close(tmp_path: Path) -> None:
    """z-lab's drafters are BF16: the error is that of rounding the weights."""
    case = cases.DRAFT_CASES["full"]
    expected = Expected("full", 100)
    convert(case.draft.write_folder(tmp_path / "draft", dtype="BF16"), tmp_path / "draft.gguf")
    with open_pair(case.target.write(tmp_path / "target.gguf"), tmp_path / "draft.gguf") as session:
        found = session.draft_logits(expected.ids)
    assert TOLERANCE < worst(found, expected.logits) < 5e-2


@pytest.mark.parametrize("name", cases.DRAFT_CASES)
def test_half_precision_drafting_stays_close(name: str, tmp_path: Path) -> None:
    case = cases.DRAFT_CASES[name]
    target, draft = case.target.write(tmp_path / "target.gguf"), case.draft.write(tmp_path / "draft.gguf")
    with pydflash.Session(target, draft, n_threads=1) as session:
        for n in case.n_tokens:
            expected = Expected(name, n)
            found = session.draft_logits(expected.ids)
            assert 0 < worst(found, expected.logits_bf16_features) < TOLERANCE_OF_HALVES, f"{name}, {n} tokens"
