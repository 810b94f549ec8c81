"""Every op of every graph of a session, asked of the real CUDA backend's supports_op.

A session on fake_cuda.cpp's device, which computes on the CPU and takes only what ggml-cuda would take.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import _pydflash
import pytest

from tests.cuda_emulator import supports
from tests.test_device import compile_library
from tests.tiny_models import TinyDraft, TinyTarget

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(_pydflash.__file__).parent
LIBRARY = "libpydflash-ggml-cuda.so"

RUN = """
import json, sys
import pydflash
options, n_prompt = json.loads(sys.argv[1])
try:
    with pydflash.Session(device="cuda", n_threads=1, n_ctx=1024, **options) as session:
        assert session.device == "cuda"
        ids = session.generate([7] * n_prompt, max_tokens=24, ignore_eos=True).ids
        print(json.dumps(len(ids)))
except pydflash.PydflashError as error:
    print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def package(fork: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the installed package with a CUDA backend that is as choosy as the real one."""
    folder = tmp_path_factory.mktemp("choosy")
    copy = folder / "site" / "_pydflash"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", LIBRARY))
    real = supports.compile_object(fork, folder)
    links = [f"-L{PACKAGE}", "-l:libpydflash-ggml.so", "-l:libpydflash-ggml-base.so", "-Wl,-rpath,$ORIGIN"]
    headers = ["-isystem", fork / "include", "-isystem", fork / "src"]
    compile_library(ROOT / "tests" / "fake_cuda.cpp", copy / LIBRARY, real, *headers, *links)
    return copy


def run(package: Path, n_prompt: int = 300, **options: object) -> object:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package.parent), str(ROOT)])}
    command = [sys.executable, "-c", RUN, json.dumps([options, n_prompt])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0", "f32"])
def test_cuda_takes_every_op_of_a_session(package: Path, kv_type: str) -> None:
    assert run(package, kv_type=kv_type, budget=16) == 24


def test_cuda_takes_every_op_of_plain_decoding(package: Path) -> None:
    assert run(package, kv_type="f16", budget=0) == 24


def test_a_head_size_that_flash_attention_lacks_is_an_error(package: Path, tmp_path: Path) -> None:
    target = TinyTarget(head_dim=48, n_ctx=1024)
    paths = {
        "target": str(target.write(tmp_path / "target.gguf")),
        "draft": str(TinyDraft.of(target).write(tmp_path / "draft.gguf")),
    }
    sentence = run(package, n_prompt=20, kv_type="f16", **paths)
    assert "has no FLASH_ATTN_EXT" in str(sentence)
