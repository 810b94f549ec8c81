#!/usr/bin/env python3
"""What nvcc makes of our CUDA kernels: registers, shared memory, spills per architecture; and the time no card beats.

    python scripts/kernel_table.py --shape 27b      # needs the extra `cuda`: pip install '.[cuda]'

Compiles every ggml/src/ggml-cuda/tree-*.cu for each architecture with the flags of the real build, reads what ptxas
says of each kernel, and prints two Markdown tables: what the compiler made of the kernels, and what a verify of the
model must move through device memory and how long that takes at the card's bandwidth. Nothing runs on a device, so the
second table is a floor by arithmetic, not a measurement.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "ggml" / "src" / "ggml-cuda"
ARCHITECTURES = ("75", "80", "86", "89", "90", "120a")
# The flags that ggml's own CMake gives its CUDA units in a release build.
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-use_fast_math", "-extended-lambda")
BANDWIDTH = 936e9  # bytes a second of an RTX 3090's memory


def load(path: Path) -> ModuleType:
    """A script beside this one, as a module."""
    if path.stem in sys.modules:
        return sys.modules[path.stem]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- compiling ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resources:
    """What ptxas says of one kernel on one architecture. Bytes, but for registers (of each thread)."""

    architecture: str
    kernel: str  # mangled
    registers: int
    shared: int  # static
    spilled: int  # stored and loaded
    stack: int


USED = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def read_resources(text: str) -> list[Resources]:
    """The output of `ptxas -v`, all kernels of it."""
    found = []
    for match in USED.finditer(text):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        spilled = int(match["stores"]) + int(match["loads"])
        sizes = (int(match["registers"]), int(shared[1]) if shared else 0, spilled, int(match["stack"]))
        found.append(Resources(match["architecture"], match["kernel"], *sizes))
    if len(found) != text.count("Compiling entry function"):
        raise ValueError(f"ptxas wrote something that is not understood:\n{text}")
    return found


@dataclass(frozen=True)
class Compiled:
    resources: list[Resources]
    ptx: dict[str, str]  # unit -> its PTX for the architecture asked for
    threads: dict[str, int]  # mangled kernel -> threads of a block, by its launch bounds


def compile_units(
    nvcc: Path, fork: Path, folder: Path, *, architectures: Sequence[str] = ARCHITECTURES, ptx: str = "86"
) -> Compiled:
    """Compile every unit of ours in the fork laid out at `fork`, for all architectures, into `folder`.

    Device code only: the host's half is compiled where the backend is. Raises RuntimeError with nvcc's words.
    """
    cuda = fork / "src" / "ggml-cuda"
    includes = [f"-I{path}" for path in (fork / "include", fork / "src", cuda)]
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    text = ""
    units: dict[str, str] = {}
    for source in sorted(SOURCES.glob("tree-*.cu")):
        keep = folder / source.stem
        keep.mkdir(parents=True)
        command = [str(nvcc), *FLAGS, *includes, *targets, "-Xptxas", "-v", "--threads", "2", "--keep", "--keep-dir"]
        command += [str(keep), "-fatbin", "-o", str(keep / "unit.fatbin"), str(cuda / source.name)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise RuntimeError(f"nvcc refused {source.name}:\n{run.stdout}{run.stderr}")
        text += run.stdout + run.stderr
        several = keep / f"{source.stem}.compute_{ptx}.ptx"
        units[source.stem] = (several if len(architectures) > 1 else keep / f"{source.stem}.ptx").read_text()
        if ".extern .shared" in units[source.stem]:  # its size is the launch's; the tables would leave it out
            raise RuntimeError(f"{source.name} takes shared memory that is sized at the launch")
    bounds = re.compile(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+), (\d+), (\d+)")
    threads = {m[1]: int(m[2]) * int(m[3]) * int(m[4]) for unit in units.values() for m in bounds.finditer(unit)}
    return Compiled(read_resources(text), units, threads)


def plain_names(mangled: Iterable[str]) -> dict[str, str]:
    """`delta_net_tree<128, 32>` of each mangled name: no namespaces, no parameters."""
    names = list(mangled)
    run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    plain = (line.replace("(anonymous namespace)::", "").removeprefix("void ") for line in run.stdout.splitlines())
    return {name: line.partition("(")[0] for name, line in zip(names, plain, strict=True)}


@dataclass(frozen=True)
class Multiprocessor:
    """What its blocks share, as cuda_occupancy.h counts it. All have 65536 registers."""

    threads: int
    blocks: int
    shared: int
    reserved: int  # shared memory that each block costs besides its own
    granularity: int  # of shared memory


MULTIPROCESSORS = {
    "75": Multiprocessor(1024, 16, 64 << 10, 0, 256),
    "80": Multiprocessor(2048, 32, 164 << 10, 1024, 128),
    "86": Multiprocessor(1536, 16, 100 << 10, 1024, 128),
    "89": Multiprocessor(1536, 24, 100 << 10, 1024, 128),
    "90": Multiprocessor(2048, 32, 228 << 10, 1024, 128),
    "120a": Multiprocessor(1536, 24, 100 << 10, 1024, 128),
}


def resident_blocks(found: Resources, threads: int) -> int:
    """Blocks of a kernel that fit one multiprocessor at a time."""
    has = MULTIPROCESSORS[found.architecture]
    warps = -(-threads // 32)
    warp_registers = -(-found.registers * 32 // 256) * 256
    by_registers = 65536 // 4 // warp_registers * 4 // warps  # four partitions; a warp lies in one
    shared = -(-(found.shared + has.reserved) // has.granularity) * has.granularity
    by_shared = has.shared // shared if shared else has.blocks
    return min(by_registers, has.threads // (warps * 32), by_shared, has.blocks)


# -- shapes, bytes and floors -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What of a model the kernels see in one step."""

    n_layer: int  # of Gated DeltaNet
    hk: int  # key heads
    hv: int  # value heads
    d: int  # of a head
    taps: int  # of the convolution
    channels: int
    n_vocab: int
    nodes: int  # of the tree, root included
    path: int  # accepted nodes
    n_kv: int  # columns of the target's mask
    block: int  # of the drafter
    depth: int  # rows of its logits that are ranked
    rank: int  # tokens taken of each
    slots: int  # columns of its mask


SHAPES = {
    "27b": Shape(
        n_layer=48, hk=16, hv=48, d=128, taps=4, channels=10240, n_vocab=248320, nodes=23, path=6, n_kv=131072,
        block=16, depth=15, rank=22, slots=4352,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Moved:
    """An op's traffic with device memory in one step."""

    op: str
    kernel: str
    calls: Callable[[Shape], int]
    formula: str  # bytes of one call
    n_bytes: Callable[[Shape], int]


MOVED = (
    Moved(
        "ssm_conv_tree",
        "conv_tree<4>",
        lambda s: s.n_layer,
        "4 channels (2 nodes + 2 taps - 1)",
        lambda s: 4 * s.channels * (2 * s.nodes + 2 * s.taps - 1),
    ),
    Moved(
        "ssm_conv_tree_persist",
        "conv_persist",
        lambda s: s.n_layer,
        "8 channels (taps - 1)",
        lambda s: 8 * s.channels * (s.taps - 1),
    ),
    Moved(
        "gated_delta_net_tree",
        "delta_net_tree<128, 32>",
        lambda s: s.n_layer,
        "4 (hv d d + nodes (d (3 hv + 2 hk) + 2 hv))",
        lambda s: 4 * (s.hv * s.d**2 + s.nodes * (s.d * (3 * s.hv + 2 * s.hk) + 2 * s.hv)),
    ),
    Moved(
        "gated_delta_net_tree_persist",
        "delta_net_persist<128>",
        lambda s: s.n_layer,
        "4 (2 hv d d + path (d (hv + hk) + hv))",
        lambda s: 4 * (2 * s.hv * s.d**2 + s.path * (s.d * (s.hv + s.hk) + s.hv)),
    ),
    Moved("tree_mask", "fill_mask<8, tree_rule>", lambda s: 1, "2 n_kv nodes", lambda s: 2 * s.n_kv * s.nodes),
    Moved("block_mask", "fill_mask<8, block_rule>", lambda s: 2, "2 slots block", lambda s: 2 * s.slots * s.block),
    Moved(
        "top_k_logp of the verify",
        "top_k_of_slice",
        lambda s: 1,
        "4 n_vocab nodes + 8 nodes",
        lambda s: 4 * s.n_vocab * s.nodes + 8 * s.nodes,
    ),
    Moved(
        "top_k_logp of the draft",
        "top_k_of_slice",
        lambda s: 1,
        "4 n_vocab depth + 8 rank depth",
        lambda s: 4 * s.n_vocab * s.depth + 8 * s.rank * s.depth,
    ),
)


# -- tables -------------------------------------------------------------------------------------------------------


def resource_table(compiled: Compiled, architectures: Sequence[str]) -> str:
    """Markdown: a line per kernel."""
    columns = " | ".join(f"sm_{a}" for a in architectures)
    lines = [
        f"| kernel | threads | {columns} | shared, bytes | spills, stack | blocks |",
        f"|-|-:|{'-:|' * len(architectures)}-:|-|-:|",
    ]
    kernels: dict[str, dict[str, Resources]] = {}
    plain = plain_names({found.kernel for found in compiled.resources} | set(compiled.threads))
    for found in compiled.resources:
        kernels.setdefault(plain[found.kernel], {})[found.architecture] = found
    threads = {plain[name]: n for name, n in compiled.threads.items()}
    for name in sorted(kernels, key=lambda name: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name)]):
        by = kernels[name]
        spills = [f"sm_{a}: {by[a].spilled} + {by[a].stack}" for a in architectures if by[a].spilled or by[a].stack]
        shared = sorted({by[a].shared for a in architectures})
        n = threads.get(name)
        blocks = [resident_blocks(by[a], n) for a in architectures] if n else []
        cells = [f"`{name}`", str(n or "?"), *(str(by[a].registers) for a in architectures)]
        cells += ["..".join(map(str, shared)), "; ".join(spills) or "0", " / ".join(map(str, blocks))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def floor_table(shape: Shape, bandwidth: float) -> str:
    """Markdown: a line per op."""
    lines = ["| op | kernel | calls | bytes of a call | MB | floor, ms |", "|-|-|-:|-|-:|-:|"]
    total = 0
    for moved in MOVED:
        n_bytes = moved.calls(shape) * moved.n_bytes(shape)
        total += n_bytes
        cells = [moved.op, f"`{moved.kernel}`", str(moved.calls(shape)), moved.formula]
        lines.append(f"| {' | '.join(cells)} | {n_bytes / 1e6:.1f} | {n_bytes / bandwidth * 1e3:.3f} |")
    lines.append(f"| all | | | | {total / 1e6:.1f} | {total / bandwidth * 1e3:.3f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="27b", help="the model whose step is counted")
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="bytes a second (default: an RTX 3090's)")
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES), help="compute capabilities, with commas")
    options = parser.parse_args()
    architectures = options.architectures.split(",")
    if unknown := set(architectures) - set(MULTIPROCESSORS):
        parser.error(f"no figures for {', '.join(sorted(unknown))}; known are {', '.join(MULTIPROCESSORS)}")
    toolchain, fetch = load(ROOT / "scripts" / "cuda_toolchain.py"), load(ROOT / "ggml" / "fetch_upstream.py")
    try:
        with tempfile.TemporaryDirectory() as folder:
            fetch.lay_out(Path(folder) / "ggml")
            nvcc = toolchain.find().nvcc
            compiled = compile_units(nvcc, Path(folder) / "ggml", Path(folder) / "units", architectures=architectures)
    except (toolchain.ToolchainError, fetch.OverlayError, RuntimeError, OSError) as error:
        print(f"pydflash: {error}", file=sys.stderr)
        return 1
    release = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    print(
        f"nvcc {match[1] if (match := re.search(r'V([0-9.]+)', release)) else '?'}, {' '.join(FLAGS)}. Registers of a"
    )
    print("thread per architecture; spilled bytes + stack; blocks of it on one multiprocessor, in the same order.\n")
    print(resource_table(compiled, architectures))
    shape = SHAPES[options.shape]
    print(f"\nOne step of {options.shape}, {shape.nodes} nodes, at {options.bandwidth / 1e9:.0f} GB/s.\n")
    print(floor_table(shape, options.bandwidth))
    return 0


if __name__ == "__main__":
    sys.exit(main())
