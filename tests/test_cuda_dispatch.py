"""The real CUDA library's host side, run without a GPU: whole sessions over a runtime that computes nothing.

null_cuda.cpp stands in for the driver, the runtime and cuBLAS. What shows: that ggml-cuda takes every op of every
graph, what a step copies and launches, that graphs are captured and replayed, and how much memory it asks for. Results
mean nothing here. Skipped where the library has not been built (it takes an hour; see scripts/build_cuda.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from operator import sub
from pathlib import Path
from typing import Any

import _pydflash
import pytest

from scripts import cuda_toolchain

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(_pydflash.__file__).parent
LIBRARY = PACKAGE / "libpydflash-ggml-cuda.so"
COUNTERS = ["launches", "graph_launches", "captures", "products", "to_device", "to_host", "held", "peak"]
EXPORTS = """
libcudart.so.13 { global: cuda*; __cuda*; null_cuda*; local: *; };
libcublas.so.13 { global: cublas*; };
libcuda.so.1 { global: cu[A-Z]*; };
"""
# The counters when the session is open and after each step; and its plan.
RUN = """
import ctypes, json, sys
import pydflash
n_prompt, n_tokens, options = json.loads(sys.argv[1])
null = ctypes.CDLL("libcudart.so.13")
seen = []
def count():
    out = (ctypes.c_uint64 * 8)()
    null.null_cuda_counters(out)
    seen.append(list(out))
with pydflash.Session(device="cuda", **options) as session:
    count()
    for chunk in session.stream([7] * n_prompt, max_tokens=n_tokens, ignore_eos=True):
        count()
    assert session.device == "cuda"
    print(json.dumps([seen, {row.name: [row.n_bytes, row.kind] for row in session.plan.rows}]))
"""

pytestmark = pytest.mark.skipif(not LIBRARY.is_file(), reason="this build has no CUDA backend")


@pytest.fixture(scope="session")
def null_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the three libraries."""
    try:
        include = cuda_toolchain.find().include
    except cuda_toolchain.ToolchainError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("null")
    (folder / "exports.map").write_text(EXPORTS)
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-isystem", include]
    flags += [f"-Wl,--version-script={folder}/exports.map", "-Wl,-soname,libcudart.so.13"]
    command = ["c++", *flags, ROOT / "tests" / "null_cuda.cpp", "-o", folder / "libcudart.so.13"]
    subprocess.run([str(part) for part in command], check=True)
    for name in ("libcublas.so.13", "libcuda.so.1"):
        (folder / name).symlink_to("libcudart.so.13")
    return folder


@dataclass(frozen=True)
class Seen:
    """What the null runtime counted: when the session was open, and by each step since the one before."""

    opened: dict[str, int]
    steps: list[dict[str, int]]
    plan: dict[str, tuple[int, str]]


def run(null_cuda: Path, *, n_prompt: int, n_tokens: int, **options: Any) -> Seen:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(null_cuda)}
    environment["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), str(ROOT)])
    command = [sys.executable, "-c", RUN, json.dumps([n_prompt, n_tokens, options])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counted, plan = json.loads(done.stdout)
    steps = [dict(zip(COUNTERS, map(sub, after, before), strict=True)) for before, after in pairwise(counted)]
    return Seen(dict(zip(COUNTERS, counted[0], strict=True)), steps, plan)


# What comes back is always zero, so every drafted token is accepted, and a tree is all its first path.


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0", "f32"])
@pytest.mark.parametrize("budget", [16, 0])
def test_a_step_is_a_few_graph_launches(kv_type: str, budget: int, null_cuda: Path) -> None:
    seen = run(null_cuda, n_prompt=300, n_tokens=8 * (16 if budget else 1), kv_type=kv_type, budget=budget, n_ctx=1024)
    assert seen.opened["launches"] == 0
    assert seen.steps[0]["launches"] > 100  # the prompt, and every graph once as it is
    assert seen.steps[-2]["launches"] == 0  # by now all are captured
    assert seen.steps[-2]["captures"] == 0
    # The drafter's context, draft, verify, commit; where nothing is drafted the context waits.
    assert seen.steps[-2]["graph_launches"] == (4 if budget else 1)
    assert seen.steps[-2]["to_device"] < 32 << 10
    assert seen.steps[-2]["to_host"] < 4 << 10


@pytest.fixture(scope="module")
def pair_27b(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The headers of a 27B pair, over files of holes."""
    folder = tmp_path_factory.mktemp("27b")
    script = ROOT / "scripts" / "make_shape.py"
    command = [sys.executable, str(script), "--shape", "27b", "--sparse", "--out", str(folder)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return {"target": str(folder / "target.gguf"), "draft": str(folder / "draft.gguf")}


def test_a_27b_at_128k_takes_what_was_planned(null_cuda: Path, pair_27b: dict[str, str]) -> None:
    seen = run(null_cuda, n_prompt=4096, n_tokens=60, n_ctx=131072, kv_type="q4_0", budget=22, **pair_27b)
    own = {"CUDA context and cuBLAS", "CUDA pool"}  # what is not ours: estimated
    planned = sum(size for name, (size, kind) in seen.plan.items() if kind != "aside" and name not in own)
    assert seen.opened["held"] == pytest.approx(planned, abs=1 << 20)
    grown = sum(step["held"] for step in seen.steps)
    assert 0 < grown <= seen.plan["CUDA pool"][0]
    assert sum(step["held"] for step in seen.steps[1:]) == 0
    assert seen.steps[2]["to_device"] < (64 << 10) + 23 * 5120 * 4  # the tree's embedding rows, and little else
    assert seen.steps[2]["to_host"] < 4 << 10
