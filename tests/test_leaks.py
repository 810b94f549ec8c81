"""What is over leaves nothing behind: the same thing many times, and what is allocated afterwards."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from pydflash import Session, Tokenizer, models
from tests.scripts import ROOT, load_script

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")[:2000]

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc what is allocated")


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return load_script("scripts/soak.py")


def left_behind(soak: ModuleType, act: Callable[[], object], n: int) -> float:
    """Bytes a time: of three rounds the least, since caches that fill do so in some of them only."""
    act()
    allocated = [soak.allocated_and_resident()[0]]
    for _ in range(3):
        for _ in range(n):
            act()
        allocated.append(soak.allocated_and_resident()[0])
    return min(after - before for before, after in pairwise(allocated)) * 2**20 / n


def test_a_tokenizer_that_is_gone(soak: ModuleType) -> None:
    path = models.target_path()
    assert left_behind(soak, lambda: Tokenizer.from_gguf(path).encode(TEXT), 25) < 500


def test_a_fork_that_was_closed(soak: ModuleType) -> None:
    with Session(n_ctx=512, n_batch=64, n_ring=256, n_threads=1) as session:
        session.append("def add(a, b):")

        def act() -> None:
            with session.fork() as twin:
                twin.generate(None, max_tokens=2)

        assert left_behind(soak, act, 10) < 500


def test_a_session_that_was_loaded_and_closed(soak: ModuleType, tmp_path: Path) -> None:
    with Session(n_ctx=512, n_batch=64, n_ring=256, n_threads=1) as session:
        session.append("def add(a, b):")
        session.save(tmp_path / "session")

    def act() -> None:
        with Session.load(tmp_path / "session", n_threads=1) as twin:
            twin.ask("Why?", max_tokens=2)

    assert left_behind(soak, act, 8) < 500
