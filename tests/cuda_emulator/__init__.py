"""CUDA kernels on the CPU: g++ compiles the backend's own .cu files, and fibers play the threads of a block.

Owns how the sources become a library: our fork is laid out as a build does it, the few constructs that are no C++
(`kernel<<<...>>>(...)`, `__shared__`) are rewritten in copies, and everything else reaches g++ as it stands, with the
headers in include/ for the CUDA toolkit's. It refuses a source in which such a construct is left over. What runs is in
emulator.h; how a graph node gets there, in harness.cpp.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
GGML = HERE.parents[1] / "ggml"
ORDERS = ("forward", "backward", "shuffled")
FLAGS = ("-std=c++17", "-fPIC", "-O1", "-g", "-fno-strict-aliasing", "-ffp-contract=off", "-Wno-attributes")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")

LAUNCH = re.compile(r"(\w+)<<<(.*?)>>>\(")
SHARED = re.compile(r"__shared__\s+(?:__align__\(\d+\)\s+)?([\w:]+)\s+(\w+)((?:\[[^;]*\])?);")


def declare_shared(match: re.Match[str]) -> str:
    dimensions = match[3].replace("[", "[(").replace("]", ")]")
    return f"auto & {match[2]} = emulator::shared<{match[1]}{dimensions}>(__LINE__);"


def rewrite(source: str) -> str:
    """What is no C++ in a CUDA source, in terms of emulator.h. Lines stay lines."""
    source = LAUNCH.sub(r"emulator::Launch{\2}(\1, ", source)
    source = SHARED.sub(declare_shared, source)
    if left := re.search(r".*(?:<<<|__shared__|\basm\b).*", re.sub(r"//.*", "", source)):
        raise ValueError(f"not understood: {left[0].strip()}")
    return source


def compile_library(
    folder: Path,
    fork: Path,
    *,
    ggml_base: Path,
    change: Callable[[str, str], str] = lambda name, text: text,
    unchanged: Path | None = None,
    flags: Sequence[str] = (),
) -> Path:
    """The tree ops of the fork laid out at `fork`, emulated, as a library in `folder`, linked with `ggml_base`.

    `change(name, text)` may put a fault into a source before it is rewritten; what it leaves alone is taken from
    `unchanged`, the folder of an earlier library.
    """
    cuda = fork / "src" / "ggml-cuda"
    folder.mkdir(parents=True, exist_ok=True)
    units: list[Path] = []
    objects: list[str] = []
    for path in [cuda / "common.cuh", *sorted(cuda.glob("tree-*"))]:
        text = change(path.name, path.read_text())
        if unchanged and path.suffix == ".cu" and text == path.read_text():
            objects.append(str(unchanged / f"{path.name}.o"))
            continue
        copy = folder / (path.name + (".cpp" if path.suffix == ".cu" else ""))
        copy.write_text(rewrite(text) if path.name != "common.cuh" else rewrite_common(text))
        if path.suffix == ".cu":
            units.append(copy)
    for name in ("emulator.cpp", "harness.cpp"):
        if unchanged:
            objects.append(str(unchanged / f"{Path(name).stem}.o"))
        else:
            units.append(HERE / name)
    includes = [folder, HERE / "include", fork / "include", fork / "src", cuda]
    command = ["g++", *FLAGS, *flags, "-DGGML_CUDA_NO_VMM", *(f"-I{path}" for path in includes)]
    jobs = []
    for unit in units:
        forced = [] if unit.name == "emulator.cpp" else ["-include", str(HERE / "include" / "cuda_runtime.h")]
        jobs.append(subprocess.Popen([*command, *forced, "-c", str(unit), "-o", str(folder / f"{unit.stem}.o")]))
    if any(job.wait() for job in jobs):
        raise RuntimeError("g++ refused a kernel; see its messages above")
    library = folder / "libemulated.so"
    objects += [str(folder / f"{unit.stem}.o") for unit in units]
    link = ["g++", *flags, "-shared", *objects, "-o", str(library), str(ggml_base), f"-Wl,-rpath,{ggml_base.parent}"]
    subprocess.run(link, check=True)
    return library


def rewrite_common(text: str) -> str:
    """Upstream's common.cuh: launches as everywhere; the assembly in it is for other vendors' devices."""
    return LAUNCH.sub(r"emulator::Launch{\2}(\1, ", text)


class Emulator:
    """A library of emulated kernels, loaded."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.emulator_supports.restype = ctypes.c_bool
        self._library.emulator_supports.argtypes = [ctypes.c_void_p]
        self._library.emulator_drop_barrier.argtypes = [ctypes.c_char_p, ctypes.c_int]
        self._library.emulator_compute.restype = ctypes.c_char_p
        self._library.emulator_compute.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64]

    def supports(self, node: int) -> bool:
        return bool(self._library.emulator_supports(node))

    def drop_barrier(self, file: str, line: int) -> None:
        """Let threads run past one barrier from now on; line 0 puts it back."""
        self._library.emulator_drop_barrier(file.encode(), line)

    def compute(self, node: int, *, order: str = "forward", seed: int = 0) -> None:
        """Compute one graph node in place of its backend. RuntimeError says what a kernel did wrong."""
        fault = self._library.emulator_compute(node, ORDERS.index(order), seed)
        if fault is not None:
            raise RuntimeError(fault.decode())
