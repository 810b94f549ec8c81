"""The CUDA build as far as a machine without a GPU can tell: the toolkit made of Python packages, what configuring
refuses, and a unit of ours compiled and linked as the real build does it.

What needs nvcc is skipped where the extra `cuda` is not installed, and what needs CMake where that is not.
"""

from __future__ import annotations

import concurrent.futures
import ctypes.util
import json
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from scripts import cuda_toolchain
from scripts.cuda_toolchain import ToolchainError
from tests.test_build import output_of

ROOT = Path(__file__).resolve().parents[1]
CMAKE = shutil.which("cmake")
NINJA = shutil.which("ninja")
needs_cmake = pytest.mark.skipif(CMAKE is None or NINJA is None, reason="cmake and ninja are not installed")


# -- the toolkit's folder ------------------------------------------------------------------------------------------


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages with the files that are looked for, and nothing in them."""
    folder = tmp_path / "site" / "nvidia" / "cu13"
    libraries = ["lib/libcublas.so.13", "lib/libcublasLt.so.13", "lib/libcudart.so.13", "lib/libcudart_static.a"]
    for name in [*cuda_toolchain.PARTS, "bin/ptxas", *libraries]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    monkeypatch.setattr(cuda_toolchain, "site_folders", lambda: iter([tmp_path / "site"]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def test_packages_are_laid_out_like_a_toolkit(packages: Path) -> None:
    root = cuda_toolchain.find().root
    for name in cuda_toolchain.PARTS:
        assert (root / name).read_text() == name
    assert not (root / "bin").is_symlink()  # nvcc looks for its toolkit above the folder it was called in
    for library in ("libcublas", "libcublasLt", "libcudart"):
        assert (root / "lib64" / f"{library}.so").read_text() == f"lib/{library}.so.13"
        assert (root / "lib" / f"{library}.so.13").is_file()
    assert cuda_toolchain.find().tool("ptxas") == root / "bin" / "ptxas"
    with pytest.raises(ToolchainError, match="nvdisasm is not installed; run 'python scripts/cuda_toolchain"):
        cuda_toolchain.find().tool("nvdisasm")


def test_the_drivers_stub_has_every_symbol_that_the_backend_takes_from_the_driver(packages: Path, fork: Path) -> None:
    stub = cuda_toolchain.find().root / "lib64" / "stubs" / "libcuda.so"
    assert re.findall(r"\(SONAME\).*\[(.*)\]", output_of("readelf", "-d", stub)) == ["libcuda.so.1"]
    symbols = {line.split()[-1] for line in output_of("nm", "-D", "--defined-only", stub).splitlines()}
    sources = [path.read_text() for path in (fork / "src" / "ggml-cuda").glob("*.cu*")]
    called = {name for text in sources for name in re.findall(r"\b(cu[A-Z][a-z]\w+)\(", text)}
    called -= {name for name in called if name.startswith(("cuda", "cublas"))}
    assert called == symbols


def test_a_toolkit_is_laid_out_once_whoever_asks(packages: Path, tmp_path: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        roots = {found.root for found in pool.map(lambda _: cuda_toolchain.find(), range(8))}
    assert len(roots) == 1
    assert [path.name for path in (tmp_path / "cache" / "pydflash" / "cuda").iterdir()] == [roots.pop().name]


def test_other_packages_get_a_folder_of_their_own(packages: Path) -> None:
    first = cuda_toolchain.find().root
    (packages / "bin" / "cuobjdump").write_text("")
    second = cuda_toolchain.find()
    assert second.root != first
    assert second.tool("cuobjdump").is_file()


def test_missing_packages_are_named(packages: Path) -> None:
    (packages / "nvvm" / "bin" / "cicc").unlink()
    with pytest.raises(ToolchainError, match=r"nvidia-nvvm is missing; run .*cuda_toolchain\.py --install'"):
        cuda_toolchain.find()
    (packages / "bin" / "nvcc").unlink()
    with pytest.raises(ToolchainError, match="nvidia-cuda-nvcc, nvidia-nvvm are missing"):
        cuda_toolchain.find()


def test_a_cache_that_cannot_be_written(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ToolchainError, match=r"cannot write to .*; set XDG_CACHE_HOME to a writable folder"):
        cuda_toolchain.find()


@pytest.mark.parametrize(
    ("compiler", "sentence"),
    [
        ("/nowhere/cc", "the C compiler '/nowhere/cc' cannot be run"),
        ("false", "'false' could not make the driver's stub"),
    ],
)
def test_a_compiler_that_does_not_work(
    compiler: str, sentence: str, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(ToolchainError, match=sentence):
        cuda_toolchain.find()
    assert list((tmp_path / "cache" / "pydflash" / "cuda").iterdir()) == []  # nothing half-made


def test_what_is_installed_is_the_extra() -> None:
    names = {requirement.partition("==")[0] for requirement in cuda_toolchain.requirements()}
    assert names == {*cuda_toolchain.PARTS.values(), "nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm"}


# -- what configuring refuses ----------------------------------------------------------------------------------------


def choose_toolkit(tmp_path: Path, **settings: str | Path) -> str:
    """Runs ggml/cuda.cmake alone, with a Python that has no packages and a PATH that has no nvcc; what it says."""
    venv.create(tmp_path / "bare")
    given = {
        "PROJECT_SOURCE_DIR": ROOT,
        "PROJECT_BINARY_DIR": tmp_path,
        "Python_EXECUTABLE": tmp_path / "bare" / "bin" / "python",
        "PYDFLASH_CUDA_ARCHITECTURES": "86-real,89-real",
        **settings,
    }
    command = [str(CMAKE), *(f"-D{name}={value}" for name, value in given.items()), "-P", str(ROOT / "ggml/cuda.cmake")]
    (tmp_path / "path").mkdir()
    environment = {"PATH": str(tmp_path / "path"), "HOME": str(tmp_path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    return re.sub(r"\s+", " ", run.stderr)  # CMake breaks lines where it likes


@needs_cmake
def test_no_compiler_at_all_says_where_to_get_one(tmp_path: Path) -> None:
    said = choose_toolkit(tmp_path)
    assert "PYDFLASH_CUDA is ON, but there is no nvcc on PATH, and none from Python packages." in said
    assert "run 'python scripts/cuda_toolchain.py --install' with that environment's python" in said
    assert "A toolkit elsewhere can be named with -DCUDAToolkit_ROOT=<folder>." in said


@needs_cmake
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"CUDAToolkit_ROOT": "/nowhere"}, "CUDAToolkit_ROOT is /nowhere, but /nowhere/bin/nvcc does not exist."),
        (
            {"CMAKE_CUDA_COMPILER": "nvcc", "PYDFLASH_CUDA_ARCHITECTURES": "86-real;native"},
            "'native' in PYDFLASH_CUDA_ARCHITECTURES is not an architecture; name numbers such as 86-real (RTX 3090)",
        ),
        ({"PYDFLASH_SANITIZE": "ON"}, "nvcc has no sanitizers; set either PYDFLASH_CUDA or PYDFLASH_SANITIZE."),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, str], sentence: str, tmp_path: Path) -> None:
    assert sentence in choose_toolkit(tmp_path, **settings)


# -- compiling as the real build does --------------------------------------------------------------------------------


def test_every_op_of_ours_is_dispatched() -> None:
    added = set(re.findall(r"^\+ +(GGML_OP_\w+),$", (ROOT / "ggml/patches/0001-op-numbers.patch").read_text(), re.M))
    cases = re.findall(r"^\+ +case (GGML_OP_\w+):$", (ROOT / "ggml/patches/0003-cuda-dispatch.patch").read_text(), re.M)
    assert added
    assert sorted(cases) == sorted([*added, *added])  # computed, and asked whether it can be


@pytest.fixture(scope="module")
def cuda_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real build, configured for sm_86 and not built."""
    try:
        cuda_toolchain.packages_folder()
    except ToolchainError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("cuda")
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "PYDFLASH_CUDA": "ON",
        "PYDFLASH_CUDA_ARCHITECTURES": "86-real",
        "Python_EXECUTABLE": sys.executable,
    }
    options = [f"-D{name}={value}" for name, value in settings.items()]
    command = [str(CMAKE), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return folder


@needs_cmake
def test_the_backend_is_configured_as_documented(cuda_build: Path) -> None:
    commands = {
        Path(entry["file"]).name: entry["command"]
        for entry in json.loads((cuda_build / "compile_commands.json").read_text())
    }
    ours = {path.name for path in (ROOT / "ggml" / "src" / "ggml-cuda").glob("*.cu")}
    assert ours <= set(commands)
    flash = [name for name in commands if name.startswith("fattn-")]
    assert {f"fattn-vec-instance-{kv}-{kv}.cu" for kv in ("f16", "q8_0", "q4_0")} <= set(flash)
    assert len([name for name in flash if "mma" in name]) > 10
    for name in [*ours, "ggml-cuda.cu"]:
        assert "-DGGML_CUDA_USE_GRAPHS" in commands[name]
        assert "arch=compute_86,code=[sm_86]" in commands[name]
        assert "NO_FA" not in commands[name]
        assert "NCCL" not in commands[name]
    link = output_of(str(NINJA), "-C", cuda_build, "-t", "commands", "-s", "_pydflash/libpydflash-ggml-cuda.so")
    assert "-Wl,--no-undefined" in link
    assert re.search(r'-Wl,-rpath,"\\?\$ORIGIN:\\?\$ORIGIN/\.\./nvidia/cu13/lib"', link)
    assert "stubs/libcuda.so" in link
    assert "cudart_static" not in link


@needs_cmake
def test_a_unit_of_ours_compiles_links_and_loads(cuda_build: Path, tmp_path: Path) -> None:
    """The smallest one; linked like the backend, it meets no driver here, and says so in the runtime's own words."""
    unit = "ggml-build/src/ggml-cuda/CMakeFiles/ggml-cuda.dir/device-check.cu.o"
    output_of(str(NINJA), "-C", cuda_build, unit)
    root = cuda_toolchain.find().root
    library = tmp_path / "check.so"
    flags = ["-shared", "-Wl,--no-undefined", f"-L{root}/lib64", f"-Wl,-rpath,{root}/lib64", "-lcudart"]
    output_of("c++", cuda_build / unit, *flags, "-o", library)
    look = (
        f"import ctypes; check = ctypes.CDLL({str(library)!r}).pydflash_cuda_unfit\n"
        "check.restype = ctypes.c_char_p\nprint(check(0))"
    )
    said = output_of(sys.executable, "-c", look).strip()
    if ctypes.util.find_library("cuda") is None:
        assert "CUDA driver version is insufficient for CUDA runtime version" in said
    resources = output_of(root / "bin" / "cuobjdump", "-res-usage", cuda_build / unit)
    assert "sm_86" in resources
