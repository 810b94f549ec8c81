"""Which device a session gets, what it says when it cannot have one, and that it runs on memory that is not the host's.

No GPU is needed: small libraries stand in for libpydflash-ggml-cuda.so in a copy of the installed package, among them
fake_cuda.cpp, whose memory nobody but the backend can touch. Each case is a process of its own, since backends are
loaded once for the process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _pydflash
import pytest
from gguf import GGUFReader

import pydflash
from tests.tiny_models import TinyTarget

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(_pydflash.__file__).parent
LIBRARY = "libpydflash-ggml-cuda.so"
PROMPT = "Nothing of this is in the device's memory."

# Prints what came of opening and running two sessions, one after the other, and what the fake device counted.
RUN = (
    f"""
import ctypes, json, sys, warnings
import pydflash
PROMPT = {PROMPT!r}
"""
    + """
wanted, target, draft, fake, options = json.loads(sys.argv[1])
out = {}
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    try:
        for _ in range(2):
            with pydflash.Session(target, draft, device=wanted, n_threads=1, **options) as session:
                out["device"] = session.device
                out["ids"] = session.generate(PROMPT, max_tokens=24, ignore_eos=True).ids
                out["plan"], out["memory"] = session.plan.as_dict(), session.memory
    except pydflash.PydflashError as error:
        out["error"] = [type(error).__name__, str(error)]
out["warnings"] = [str(w.message) for w in said]
out["at"] = [w.filename for w in said]
if fake:
    counted = (ctypes.c_uint64 * 7)()
    ctypes.CDLL(fake).fake_cuda_traffic(counted)
    names = ["set_calls", "set_bytes", "get_calls", "get_bytes", "graphs", "allocations", "allocated_bytes"]
    out["traffic"] = dict(zip(names, counted))
print(json.dumps(out))
"""
)


# Prints what was said on the CPU and on the fake device behind everything that keeps or moves a timeline, and how many
# bytes the device gave back while a session was forked and while it went back.
TIMELINE = """
import ctypes, json, sys
import pydflash

target, draft, fake, path = json.loads(sys.argv[1])
counted = (ctypes.c_uint64 * 7)()

def bytes_back():
    ctypes.CDLL(fake).fake_cuda_traffic(counted)
    return counted[3]

def say(session):
    return session.generate(None, max_tokens=12, ignore_eos=True).ids

out = {}
for device in ("cpu", "cuda"):
    said = out[device] = []
    options = {"device": device, "n_threads": 1}
    with pydflash.Session(target, draft, kv_type="f32", n_batch=64, n_ring=256, **options) as session:
        session.append([7 * i % 288 for i in range(300)])
        place = session.checkpoint()
        said.append(say(session))
        before = bytes_back()
        twin = session.fork()
        forked = bytes_back() - before
        session.rewind(place)
        gone_back = bytes_back() - before - forked
        said.append(say(session))
        said.append(say(twin))
        twin.save(path)
        said.append(say(twin))
        twin.close()
    with pydflash.Session.load(path, **options) as session:
        said.append(say(session))
out["bytes"] = [forked, gone_back]
print(json.dumps(out))
"""


def output_of(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def compile_library(source: Path, into: Path, *flags: str | Path) -> None:
    command = [
        "c++",
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        source,
        *flags,
        "-o",
        into,
    ]
    subprocess.run([str(part) for part in command], check=True)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the installed package without a CUDA backend."""
    copy = tmp_path / "site" / "_pydflash"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("models", "__pycache__", LIBRARY))
    return copy


@pytest.fixture(scope="session")
def fake_cuda(fork: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("fake") / LIBRARY
    links = [f"-L{PACKAGE}", "-l:libpydflash-ggml.so", "-l:libpydflash-ggml-base.so", "-Wl,-rpath,$ORIGIN"]
    headers = ["-isystem", fork / "include", "-isystem", fork / "src"]
    compile_library(ROOT / "tests" / "fake_cuda.cpp", library, *headers, *links)
    return library


Open = Callable[..., dict[str, Any]]


@pytest.fixture
def open_session(package: Path, tiny_target: Path, tiny_draft: Path) -> Open:
    """Opens and runs two sessions in a process that sees `package`; what came of it."""

    def run(
        device: str,
        target: Path = tiny_target,
        draft: Path | None = tiny_draft,
        *,
        fake: Path | None = None,
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        if fake is not None:
            fake = Path(shutil.copy(fake, package))
        environment = {**os.environ, **(environment or {})}
        environment["PYTHONPATH"] = os.pathsep.join([str(package.parent), str(ROOT)])
        paths = [None if path is None else str(path) for path in (target, draft, fake)]
        arguments = json.dumps([device, *paths, {"kv_type": "f32", **options}])
        done = subprocess.run(
            [sys.executable, "-c", RUN, arguments], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    return run


# -- no device -----------------------------------------------------------------------------------------------------


def test_without_the_library_auto_is_the_cpu_and_says_nothing(open_session: Open) -> None:
    result = open_session("auto")
    assert result["device"] == "cpu"
    assert result["warnings"] == []
    assert len(result["ids"]) == 24


def test_without_the_library_cuda_says_how_to_build_it(open_session: Open) -> None:
    sentence = (
        "device is 'cuda', but this pydflash was built without its CUDA backend; "
        "'python scripts/build_cuda.py' builds it"
    )
    assert open_session("cuda")["error"] == ["DeviceError", sentence]


def needing(library: str, folder: Path, into: Path) -> None:
    """A backend that needs a library which is nowhere."""
    (folder / "empty.cpp").write_text("")
    compile_library(folder / "empty.cpp", folder / library, f"-Wl,-soname,{library}")
    compile_library(folder / "empty.cpp", into, "-Wl,--no-as-needed", folder / library)


@pytest.mark.parametrize(
    ("missing", "advice"),
    [
        ("libcuda.so.1", "that library comes with NVIDIA's driver"),
        ("libcublas.so.13", "'python scripts/cuda_toolchain.py --install' installs it"),
    ],
)
def test_a_missing_library_is_told_in_the_loaders_words(
    missing: str, advice: str, open_session: Open, package: Path, tmp_path: Path
) -> None:
    needing(missing, tmp_path, package / LIBRARY)
    reason = (
        "the CUDA backend cannot be loaded: "
        f"{missing}: cannot open shared object file: No such file or directory; {advice}"
    )
    assert open_session("cuda")["error"] == ["DeviceError", f"device is 'cuda', but {reason}"]
    result = open_session("auto")  # two sessions, one warning, at the caller's own line
    assert result["warnings"] == [f"device 'auto' is the CPU: {reason}"]
    assert result["at"] == ["<string>"]
    assert result["device"] == "cpu"
    assert open_session("cpu")["warnings"] == []


def test_another_packages_backend_is_refused(open_session: Open, package: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign.cpp").write_text(
        "static struct { int api_version; void * interface[8]; } reg = {2, {}};\n"
        'extern "C" void * ggml_backend_init() { return &reg; }\n'
    )
    compile_library(tmp_path / "foreign.cpp", package / LIBRARY)
    kind, sentence = open_session("cuda")["error"]
    assert kind == "DeviceError"
    assert f"the CUDA backend {package / LIBRARY} does not fit this libpydflash; build both again." in sentence
    assert "incompatible API version" in sentence


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"FAKE_CUDA_NO_DEVICE": "1"}, "the CUDA backend found no device: no CUDA-capable device is detected"),
        (
            {"FAKE_CUDA_UNFIT": "no kernel image is available for execution on the device"},
            "the CUDA backend was not compiled for this machine's Fake GPU (no kernel image is available for execution "
            "on the device); build it again with PYDFLASH_CUDA_ARCHITECTURES set to what this card is",
        ),
    ],
)
def test_a_backend_without_a_usable_device(
    environment: dict[str, str], reason: str, open_session: Open, fake_cuda: Path
) -> None:
    refused = open_session("cuda", fake=fake_cuda, environment=environment)
    assert refused["error"] == ["DeviceError", f"device is 'cuda', but {reason}"]
    result = open_session("auto", fake=fake_cuda, environment=environment)
    assert result["warnings"] == [f"device 'auto' is the CPU: {reason}"]
    assert result["device"] == "cpu"


def test_device_info_is_about_this_machine() -> None:
    info = pydflash.device_info("cpu")
    assert (info.kind, info.why_cpu) == ("cpu", "")
    assert info.name
    assert 0 < info.n_free <= info.n_bytes
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert info.n_bytes == pytest.approx(pages, rel=0.01)
    with pytest.raises(pydflash.ArgumentError, match=r"device is 'cdua', did you mean 'cuda'\?"):
        pydflash.device_info("cdua")


def test_what_was_promised_to_a_session_is_not_free(tmp_path: Path) -> None:
    """Cache rows that nobody has written yet take no memory, but they will."""
    target = TinyTarget(n_ctx=1 << 22).write(tmp_path / "target.gguf")  # 2 GiB of f32 rows
    free = [pydflash.device_info("cpu").n_free]
    if free[0] < 6 << 30:
        pytest.skip("needs 6 GiB of free memory")
    with pydflash.Session(target, device="cpu", kv_type="f32", n_batch=64, n_threads=1) as session:
        assert session.memory["KV cache"] > 2 << 30
        free.append(pydflash.device_info("cpu").n_free)
    free.append(pydflash.device_info("cpu").n_free)
    assert free[0] - free[1] > 1.5 * 2**30
    assert free[2] - free[1] > 1.5 * 2**30


# -- a device with memory of its own ---------------------------------------------------------------------------------


def test_weights_that_do_not_fit_are_refused_before_any_is_copied(open_session: Open, fake_cuda: Path) -> None:
    result = open_session("cuda", fake=fake_cuda, environment={"FAKE_CUDA_FREE_MIB": "0"})
    kind, sentence = result["error"]
    assert kind == "OutOfMemoryError"
    assert re.match(r"a context of \d+ tokens takes \d+ MiB, but cuda has 0 free:\n", sentence)
    assert "target weights" in sentence
    assert set(result["traffic"].values()) == {0}


def test_a_session_runs_on_memory_the_host_cannot_touch(open_session: Open, fake_cuda: Path) -> None:
    on_cpu = open_session("cpu", fake=fake_cuda)
    assert set(on_cpu["traffic"].values()) == {0}
    on_device = open_session("auto", fake=fake_cuda)
    assert (on_device["device"], on_device["warnings"]) == ("cuda", [])
    assert on_device["ids"] == on_cpu["ids"]
    for result in (on_cpu, on_device):  # what was planned is what is allocated; the plan's figures are MiB
        del result["memory"]["kept graphs, on the host"]  # planned for more of them
        assert {name: round(n / 2**20, 3) for name, n in result["memory"].items()} == {
            name: result["plan"][name] for name in result["memory"]
        }


def test_a_timeline_is_kept_and_moved_on_memory_the_host_cannot_touch(
    package: Path, fake_cuda: Path, tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    paths = [tiny_target, tiny_draft, shutil.copy(fake_cuda, package), tmp_path / "session"]
    done = subprocess.run(
        [sys.executable, "-c", TIMELINE, json.dumps([str(path) for path in paths])],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(package.parent), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    first, again, further, saved, loaded = out["cuda"]
    assert out["cpu"] == out["cuda"]
    assert first == again
    assert saved == loaded != further
    assert out["bytes"] == [0, 0]  # copies stay on the device


def test_an_op_that_the_device_lacks_is_a_sentence_at_opening(open_session: Open, fake_cuda: Path) -> None:
    result = open_session("cuda", fake=fake_cuda, environment={"FAKE_CUDA_LACKS": "FLASH_ATTN_EXT"})
    sentence = "Fake GPU has no FLASH_ATTN_EXT for f32 rows of 32, which this model needs; use device 'cpu'"
    assert result["error"] == ["UnsupportedModelError", sentence]


OPEN = """
import ctypes, json, sys
from pydflash._lib import check, ffi, lib
target, draft, fake = sys.argv[1:]
counted = (ctypes.c_uint64 * 7)()
def traffic():
    ctypes.CDLL(fake).fake_cuda_traffic(counted)
    return [counted[0], counted[1], counted[5]]
model, drafter = ffi.new("pf_model **"), ffi.new("pf_draft **")
check(lib.pf_model_open(target.encode(), b"cuda", model))
first = traffic()
check(lib.pf_draft_open(draft.encode(), model[0], drafter))
print(json.dumps([first, traffic()]))
"""


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_copied_once_and_embedding_rows_stay_with_the_host(
    tied: bool, package: Path, fake_cuda: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    path = TinyTarget(tied=tied, scales=True).write(tmp_path / "target.gguf", tokenizer=True)
    tensors = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    if not tied:  # else it is the output matrix as well
        del tensors["token_embd.weight"]
    drafted = [int(tensor.n_bytes) for tensor in GGUFReader(tiny_draft).tensors]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package.parent), str(ROOT)])}
    command = [sys.executable, "-c", OPEN, str(path), str(tiny_draft), shutil.copy(fake_cuda, package)]
    counts = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
    first = [len(tensors), sum(tensors.values()), 1]  # copies, bytes, buffers
    assert counts == [first, [first[0] + len(drafted), first[1] + sum(drafted), 2]]


# -- the real library, where it has been built -----------------------------------------------------------------------


@pytest.mark.skipif(not (PACKAGE / LIBRARY).is_file(), reason="this build has no CUDA backend")
def test_the_real_library_loads_and_finds_no_device(open_session: Open, package: Path, tmp_path: Path) -> None:
    """With a driver's library that only has the driver's symbols: nothing undefined, and no device."""
    (package / LIBRARY).symlink_to(PACKAGE / LIBRARY)
    (package.parent / "nvidia").symlink_to(PACKAGE.parent / "nvidia")
    names = set(re.findall(r" U (cu[A-Z]\w+)$", output_of("nm", "-D", PACKAGE / LIBRARY), flags=re.MULTILINE))
    (tmp_path / "driver.cpp").write_text("".join(f'extern "C" int {name}() {{ return 34; }}\n' for name in names))
    compile_library(tmp_path / "driver.cpp", tmp_path / "libcuda.so.1", "-Wl,-soname,libcuda.so.1")
    result = open_session("auto", environment={"LD_LIBRARY_PATH": str(tmp_path)})
    assert result["device"] == "cpu"
    assert len(result["warnings"]) == 1
    assert result["warnings"][0].startswith(
        "device 'auto' is the CPU: the CUDA backend found no device: ggml_cuda_init: failed to initialize CUDA: "
    )


# -- what CUDA graphs need -------------------------------------------------------------------------------------------

STEPS = """
import ctypes, json, sys
import pydflash
target, draft, fake = sys.argv[1:]
traffic, replays = (ctypes.c_uint64 * 7)(), (ctypes.c_uint64 * 4)()
out = []
options = dict(kv_type="f32", n_ctx=512, budget=16, n_threads=1)
options["checkpoint_memory"] = 1  # states that are kept are no step's traffic
with pydflash.Session(target, draft, device="cuda", **options) as session:
    def note():
        ctypes.CDLL(fake).fake_cuda_traffic(traffic)
        ctypes.CDLL(fake).fake_cuda_replays(replays)
        counters = session.counters
        counted = [counters.n_set, counters.bytes_set, counters.n_get, counters.bytes_get, counters.graph_runs]
        out.append([counted, list(traffic)[:5], list(replays), counters.graphs_built, traffic[5]])
    for temperature in (0.0, 0.0, 0.9):
        note()
        session.generate([3, 1, 4, 1, 5], max_tokens=60, temperature=temperature, seed=1, ignore_eos=True)
    note()
print(json.dumps(out))
"""


def test_every_run_of_a_graph_but_the_first_could_be_replayed(
    package: Path, fake_cuda: Path, tiny_target: Path, tiny_draft: Path
) -> None:
    """And what a session counts is what the device saw."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package.parent), str(ROOT)])}
    command = [sys.executable, "-c", STEPS, str(tiny_target), str(tiny_draft), shutil.copy(fake_cuda, package)]
    notes = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
    opened = notes[0][1]
    for counted, seen, (recorded, replayed, unsealed, changed), built, allocated in notes:
        assert counted == [b - a for a, b in zip(opened, seen, strict=True)]
        assert (recorded, recorded + replayed) == (built, counted[-1])
        assert unsealed == changed == 0
        assert allocated == notes[0][4]
    first, again = notes[1], notes[2]
    assert first[2][1] > 10 * first[2][0]
    assert again[2][0] == first[2][0], "the second run of a prompt builds nothing"
