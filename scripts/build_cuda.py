#!/usr/bin/env python3
"""Build pydflash with its CUDA backend, on a machine that has nothing but pip and a C++ compiler.

    python scripts/build_cuda.py                               # into the active environment, for an RTX 3090 and 4090
    python scripts/build_cuda.py --architectures 120a-real     # for an RTX 5090 alone
    python scripts/build_cuda.py --only out                    # libpydflash-ggml-cuda.so alone, into a folder

First the compiler and the libraries go into the active environment (the extra `cuda`, 0.9 GB), then pydflash is built
there. The long part is the backend: RESULTS.md says how long. A build that was stopped goes on where it was. At the end
this says how long it took, how large the library is, and what device there is now. No GPU is needed for building.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import cuda_toolchain  # noqa: E402

LIBRARY = "libpydflash-ggml-cuda.so"
# From another folder than the repository, which holds a pydflash without compiled parts.
LOOK = (
    "import pathlib, _pydflash, pydflash; print(pathlib.Path(_pydflash.__file__).parent); print(pydflash.device_info())"
)


class BuildError(Exception):
    """The build failed; the message says which part, and the tool's own words stand above it."""


def run(*command: str | Path, environment: dict[str, str]) -> None:
    print("+", *command, flush=True)
    if subprocess.run([str(part) for part in command], env=environment, check=False).returncode != 0:
        raise BuildError(f"{command[0]} failed; what it said stands above.")


def install(architectures: str, environment: dict[str, str]) -> Path:
    """pydflash with the backend, into this environment; the library there."""
    settings = {"PYDFLASH_CUDA": "ON", "PYDFLASH_CUDA_ARCHITECTURES": architectures}
    options = [part for name, value in settings.items() for part in ("-C", f"cmake.define.{name}={value}")]
    run(sys.executable, "-m", "pip", "install", "--verbose", *options, ROOT, environment=environment)
    found = subprocess.run([sys.executable, "-c", LOOK], cwd="/", capture_output=True, text=True, check=False)
    if found.returncode != 0:
        raise BuildError(f"pydflash was installed, but cannot be imported:\n{found.stderr.strip()}")
    package, device = found.stdout.strip().split("\n", 1)
    print(device)
    return Path(package) / LIBRARY


def build_library(architectures: str, into: Path, environment: dict[str, str]) -> Path:
    """The library alone, in the folder `into`."""
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        raise BuildError("cmake or ninja is not on PATH; 'pip install cmake ninja' brings both.")
    folder = ROOT / "build" / "cuda-only"
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "PYDFLASH_CUDA": "ON",
        "PYDFLASH_CUDA_ARCHITECTURES": architectures,
        "Python_EXECUTABLE": sys.executable,
    }
    options = [f"-D{name}={value}" for name, value in settings.items()]
    run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options, environment=environment)
    run("cmake", "--build", folder, "--target", "ggml-cuda", environment=environment)
    into.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy2(folder / "_pydflash" / LIBRARY, into))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--architectures", default="86-real,89-real", metavar="LIST", help="what to compile for (86-real,89-real)"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="compilers at once (default: as many as cores)")
    parser.add_argument("--only", type=Path, metavar="FOLDER", help="build the backend's library alone, into a folder")
    options = parser.parse_args()
    environment = dict(os.environ)
    if options.jobs:
        environment["CMAKE_BUILD_PARALLEL_LEVEL"] = str(options.jobs)
    start = time.monotonic()
    try:
        cuda_toolchain.install()
        if options.only:
            library = build_library(options.architectures, options.only, environment)
        else:
            library = install(options.architectures, environment)
    except (BuildError, cuda_toolchain.ToolchainError, OSError) as error:
        print(f"pydflash: {error}", file=sys.stderr)
        return 1
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{library}: {library.stat().st_size / 2**20:.0f} MiB for {options.architectures}, "
        f"{(time.monotonic() - start) / 60:.1f} minutes, {(used.ru_utime + used.ru_stime) / 60:.1f} of CPU time"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
