"""The drafter's ring: past its length the oldest positions leave, one for one, and nothing else changes.

The expected logits are float64 numpy over exactly the last n_ring positions; a reference that sees one position more or
less must be off by far more than the tolerance, or the test could not fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import pydflash
from tests.reference_drafter import ReferenceDrafter
from tests.tiny_models import TinyDraft, TinyTarget

N_RING = 256
TOLERANCE = 1e-4  # of the largest logit, as for the other references


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Random models whose contexts are long enough to go around the ring."""
    folder = tmp_path_factory.mktemp("ring")
    target = TinyTarget(n_ctx=2048)
    return target.write(folder / "target.gguf", tokenizer=True), TinyDraft.of(target).write(folder / "draft.gguf")


@pytest.fixture(scope="module")
def session(pair: tuple[Path, Path]) -> Iterator[pydflash.Session]:
    with pydflash.Session(*pair, kv_type="f32", n_ctx=1024, n_batch=64, n_ring=N_RING, n_threads=1) as session:
        yield session


def worst(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("n", [N_RING - 1, N_RING, N_RING + 1, N_RING + 37, 2 * N_RING, 2 * N_RING + 1, 777])
def test_the_drafter_sees_the_last_n_ring_positions(pair: tuple[Path, Path], session: pydflash.Session, n: int) -> None:
    ids = [int(i) for i in np.random.default_rng(n).integers(0, 256, n + 1)]
    drafter = ReferenceDrafter(*pair)
    features = session.hidden(ids[:n], drafter.target_layers)
    found = session.draft_logits(ids)
    assert worst(found, drafter.logits(features, ids[-1], N_RING)) < TOLERANCE
    for other in (N_RING - 1, N_RING + 1):
        if min(n, other) != min(n, N_RING):
            assert worst(found, drafter.logits(features, ids[-1], other)) > 3 * TOLERANCE
