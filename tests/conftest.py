"""What several test files share: one random pair of models, written once, and a cache folder that is not the user's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

import pydflash
from tests.tiny_models import TinyDraft, TinyTarget, byte_tokenizer, write_gguf

# How long an example takes says something about the machine, not about the code.
settings.register_profile("pydflash", deadline=None)
settings.load_profile("pydflash")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the tests marked 'device' run: cpu (default) or cuda")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "device: tests of ops, on the backend that --device names")


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """The backend under test."""
    return str(pytestconfig.getoption("--device"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All but the pinned archive of upstream's: its hash is checked at every use, and it is large."""
    cache = tmp_path_factory.mktemp("cache")
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pydflash" / "upstream"
    users.mkdir(parents=True, exist_ok=True)
    (cache / "pydflash").mkdir()
    (cache / "pydflash" / "upstream").symlink_to(users)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield


@pytest.fixture(scope="session")
def fork(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our fork of ggml, laid out as a build does it."""
    folder = tmp_path_factory.mktemp("fork") / "ggml"
    script = Path(__file__).resolve().parents[1] / "ggml" / "fetch_upstream.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True)
    return folder


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


@pytest.fixture(scope="session")
def agreeing_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target that says a, b, c or d with the same odds whatever came before, and a drafter with those very odds: the
    one pair of random-size models whose every tree is partly accepted."""
    target, draft = TinyTarget(), TinyDraft.of(TinyTarget())
    tensors, drafted = target.tensors(), draft.tensors()
    for weights in (tensors, drafted):
        for name in weights:
            if name.endswith(("ssm_out.weight", "attn_output.weight", "ffn_down.weight")):  # no layer adds anything
                weights[name] = np.zeros_like(weights[name])
        weights["output_norm.weight"] = np.ones_like(weights["output_norm.weight"])
    tensors["token_embd.weight"] = np.ones_like(tensors["token_embd.weight"])
    tensors["output.weight"] = np.full_like(tensors["output.weight"], -1.0)
    for token, logit in zip(range(64, 68), (2.0, 1.5, 1.0, 0.0), strict=True):  # 64 is "a"
        tensors["output.weight"][token] = logit / target.n_embd
    folder = tmp_path_factory.mktemp("agreeing")
    keys = target.gguf_keys() | byte_tokenizer(target.n_vocab)
    return (
        write_gguf(folder / "target.gguf", "qwen35", keys, tensors),
        write_gguf(folder / "draft.gguf", "dflash", draft.gguf_keys(), drafted),
    )
