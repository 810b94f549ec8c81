#!/usr/bin/env python3
"""CUDA's compiler and libraries out of Python packages, laid out as CMake and nvcc expect a toolkit to lie.

    python scripts/cuda_toolchain.py --install     # pip-installs what is missing (0.9 GB), prints the toolkit's folder
    python scripts/cuda_toolchain.py --nvcc        # the compiler's path alone

The packages (the extra `cuda` in pyproject.toml) unpack into site-packages/nvidia/cu13 without lib64, without the .so
links that a linker looks for and without the driver's stub. This makes a folder of links to them in the user's cache,
one for each set of packages. Only the standard library is needed, since the build runs this too. It refuses an
environment that lacks a package, and never changes anything but the cache (and, with --install, the environment).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LAYOUT = 1  # raised when the folder is laid out in another way, so that older ones are not taken for it
PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
PARTS = {  # a file of each package that a build needs
    "bin/nvcc": "nvidia-cuda-nvcc",
    "nvvm/bin/cicc": "nvidia-nvvm",
    "include/crt/host_config.h": "nvidia-cuda-crt",
    "include/cuda_runtime.h": "nvidia-cuda-runtime",
    "include/cccl/cub/cub.cuh": "nvidia-cuda-cccl",
    "include/cublas_v2.h": "nvidia-cublas",
}
LINKED = ("libcublas", "libcublasLt", "libcudart")  # what ggml-cuda names at link time

# The driver's library comes with the driver. What is linked here only names its symbols (CUresult f(...)), all of
# which ggml's memory pool calls; each would answer CUDA_ERROR_STUB_LIBRARY.
DRIVER_FUNCTIONS = (
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuGetErrorString",
    "cuMemAddressFree",
    "cuMemAddressReserve",
    "cuMemCreate",
    "cuMemGetAllocationGranularity",
    "cuMemMap",
    "cuMemRelease",
    "cuMemSetAccess",
    "cuMemUnmap",
)


class ToolchainError(Exception):
    """There is no toolchain; the message is one sentence for the person who builds."""


@dataclass(frozen=True)
class Toolchain:
    """A folder laid out like an installed CUDA toolkit."""

    root: Path  # what CMake calls CUDAToolkit_ROOT

    @property
    def nvcc(self) -> Path:
        return self.root / "bin" / "nvcc"

    @property
    def include(self) -> Path:
        return self.root / "include"

    def tool(self, name: str) -> Path:
        """cuobjdump, nvdisasm, ptxas, ...; ToolchainError when its package is not installed."""
        path = self.root / "bin" / name
        if not path.is_file():
            raise ToolchainError(f"{name} is not installed; run 'python scripts/cuda_toolchain.py --install'.")
        return path


def requirements() -> list[str]:
    """The packages of the extra `cuda`."""
    listed = re.search(r"^cuda = \[(.*?)\]", PYPROJECT.read_text(), flags=re.MULTILINE | re.DOTALL)
    if not listed:
        raise ToolchainError(f"{PYPROJECT} has no extra 'cuda'.")
    return re.findall(r'"([^"]+)"', listed[1])


def site_folders() -> Iterator[Path]:
    """Where packages lie. Not only sys.path: an isolated build hides the environment's own packages from it."""
    named = [*(sysconfig.get_path(kind) for kind in ("purelib", "platlib")), site.getusersitepackages(), *sys.path]
    for folder in dict.fromkeys(named):
        if folder:
            yield Path(folder)


def packages_folder() -> Path:
    """site-packages/nvidia/cu13, all parts of it there; ToolchainError names the packages that are not."""
    best: list[str] = list(PARTS.values())
    for folder in site_folders():
        found = folder / "nvidia" / "cu13"
        missing = [package for part, package in PARTS.items() if not (found / part).is_file()]
        if not missing:
            return found.resolve()
        best = min(best, missing, key=len)
    raise ToolchainError(
        f"CUDA's compiler is not complete in {sys.prefix}: {', '.join(best)} {'is' if len(best) == 1 else 'are'} "
        "missing; run 'python scripts/cuda_toolchain.py --install' with that environment's python (0.9 GB)."
    )


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pydflash" / "cuda"


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def lay_out(packages: Path, root: Path) -> None:
    """The toolkit's folder, all links but for the stub, in a folder that does not exist yet."""
    # nvcc takes the folder above the name it was called by for the toolkit's, so bin/ is a folder, not a link.
    for path in sorted((packages / "bin").iterdir()):
        link(root / "bin" / path.name, path)
    for name in ("include", "nvvm"):
        link(root / name, packages / name)
    for path in sorted((packages / "lib").iterdir()):
        link(root / "lib64" / path.name, path)
        short = path.name.partition(".so.")[0]
        if short in LINKED and path.name != f"{short}.so":
            link(root / "lib64" / f"{short}.so", path)
    link(root / "lib", Path("lib64"))
    source = root / "lib64" / "stubs" / "libcuda.c"
    source.parent.mkdir()
    source.write_text("".join(f"int {name}(void) {{ return 34; }}\n" for name in DRIVER_FUNCTIONS))
    compiler = os.environ.get("CC") or "cc"
    command = [*compiler.split(), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(source)]
    try:
        run = subprocess.run(
            [*command, "-o", str(source.with_suffix(".so"))], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise ToolchainError(f"the C compiler '{compiler}' cannot be run ({error.strerror}); set CC to one.") from error
    if run.returncode != 0:
        raise ToolchainError(f"'{compiler}' could not make the driver's stub library:\n{run.stderr.strip()}")


def content_key(packages: Path) -> str:
    """What the folder's links depend on: where the packages are, what files they have, and how they are laid out."""
    names = [path.relative_to(packages).as_posix() for part in ("bin", "lib") for path in (packages / part).iterdir()]
    stamp = repr((LAYOUT, DRIVER_FUNCTIONS, str(packages), sorted(names)))
    return hashlib.sha256(stamp.encode()).hexdigest()[:16]


def find() -> Toolchain:
    """The toolchain of this environment, laid out if it is not yet. Several processes may ask at once."""
    packages = packages_folder()
    cache = cache_folder()
    root = cache / content_key(packages)
    if not root.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(dir=cache, prefix="unfinished-"))
        except OSError as error:
            raise ToolchainError(
                f"cannot write to {cache} ({error.strerror}); set XDG_CACHE_HOME to a writable folder."
            ) from error
        try:
            lay_out(packages, scratch / root.name)
            try:
                os.rename(scratch / root.name, root)
            except OSError:  # another process was first, and its folder equals ours
                if not root.is_dir():
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return Toolchain(root=root)


def install() -> None:
    """Installs the extra `cuda` with pip into the environment of this python."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", *requirements()]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
        raise ToolchainError(
            f"pip could not install CUDA's packages into {sys.prefix}; what it said stands above. They exist for Linux "
            "on x86-64 and arm64; a system CUDA toolkit does as well, named with -DCUDAToolkit_ROOT=<folder>."
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--install", action="store_true", help="first pip-install the packages that are missing")
    parser.add_argument("--nvcc", action="store_true", help="print the compiler's path instead of the folder's")
    options = parser.parse_args()
    try:
        if options.install:
            install()
        toolchain = find()
    except (ToolchainError, OSError) as error:
        print(f"pydflash: {error}", file=sys.stderr)
        return 1
    print(toolchain.nvcc if options.nvcc else toolchain.root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
