"""What several test files share: one random pair of models, written once, and a cache folder that is not the user's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

import pydflash
from tests.tiny_models import TinyDraft, TinyTarget

# How long an example takes says something about the machine, not about the code.
settings.register_profile("pydflash", deadline=None)
settings.load_profile("pydflash")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random target with a byte-level tokenizer, as GGUF; f32, so that paths agree to the token."""
    return TinyTarget().write(tmp_path_factory.mktemp("tiny") / "target.gguf", tokenizer=True)


@pytest.fixture(scope="session")
def tiny_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random drafter for it, as GGUF."""
    return TinyDraft.of(TinyTarget()).write(tmp_path_factory.mktemp("tiny") / "draft.gguf")


@pytest.fixture
def tiny_session(tiny_target: Path, tiny_draft: Path) -> Iterator[pydflash.Session]:
    """A session on both, with an f32 KV cache, and one thread: two wait for each other on a busy machine."""
    with pydflash.Session(tiny_target, tiny_draft, kv_type="f32", n_threads=1) as session:
        yield session
