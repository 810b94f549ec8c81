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

TOLERANCE = 1e-4  # of the largest expected value


def expected_logits(name: str, n: int) -> tuple[npt.NDArray[np.int32], F32]:
    case = cases.DRAFT_CASES[name]
    with np.load(cases.DRAFT_FILE) as file:
        ids, logits = file[f"{name}.{n}.ids"], file[f"{name}.{n}.logits"]
        weights = str(file[f"{name}.weights"])
    current = cases.fingerprint(case.target.hf_weights(), case.draft.hf_weights())
    assert weights == current, f"{name}: the models changed, {cases.REMAKE}"
    return ids, logits


def check(session: pydflash.Session, name: str) -> None:
    case = cases.DRAFT_CASES[name]
    for n in case.n_tokens:
        ids, expected = expected_logits(name, n)
        found = session.draft_logits(ids)
        assert found.shape == (case.draft.block_size - 1, case.target.n_vocab)
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max(), f"{name}, {n} tokens"


def open_pair(target: Path, draft: Path) -> pydflash.Session:
    return pydflash.Session(target, draft, kv_type="f32", n_ctx=1024)


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
    ids, expected = expected_logits("full", 100)
    convert(case.draft.write_folder(tmp_path / "draft", dtype="BF16"), tmp_path / "draft.gguf")
    with open_pair(case.target.write(tmp_path / "target.gguf"), tmp_path / "draft.gguf") as session:
        found = session.draft_logits(ids)
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    assert 0 < error < 5e-2
