"""What the build promises: the shape of the installed libraries, and an overlay that refuses what it cannot trust.

The libraries are read with binutils, which any machine that compiled them has. The overlay is run on small archives
made here; nothing is fetched from a network.
"""

from __future__ import annotations

import ctypes
import difflib
import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import _pydflash
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(_pydflash.__file__).parent
LIBRARIES = sorted(PACKAGE.glob("*.so"))
CUDA = PACKAGE / "libpydflash-ggml-cuda.so"


fetch_upstream = load_script("ggml/fetch_upstream.py")
OverlayError = fetch_upstream.OverlayError


def output_of(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


# -- the installed libraries --------------------------------------------------------------------------------------


def test_library_exports_exactly_what_the_header_declares() -> None:
    header = (ROOT / "src_cpp" / "pydflash.h").read_text()
    declared = set(re.findall(r"^PF_API .*?\b(pf_\w+)\(", header, flags=re.MULTILINE))
    symbols = output_of("nm", "-D", "--defined-only", PACKAGE / "libpydflash.so")
    exported = {line.split()[-1] for line in symbols.splitlines()}
    assert exported == declared
    assert declared <= set(dir(_pydflash.lib))


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_libraries_find_each_other_and_nobody_elses(library: Path) -> None:
    dynamic = output_of("readelf", "-d", library)
    packages = ":$ORIGIN/../nvidia/cu13/lib" if library == CUDA else ""
    assert re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic) == ["$ORIGIN" + packages]
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    ours = [name for name in needed if "ggml" in name or "pydflash" in name]
    assert ours or library.name == "libpydflash-ggml-base.so"
    # Another package's libggml-base.so.0 in the same process must never stand in for ours, so no name is shared.
    assert all(name.startswith("libpydflash") and (PACKAGE / name).is_file() for name in ours)
    assert all(name == library.name for name in re.findall(r"\(SONAME\).*\[(.*)\]", dynamic))


def test_package_holds_no_other_binaries_or_headers() -> None:
    files = {path.name for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    files -= {path.name for path in (PACKAGE / "models").rglob("*")}
    fixed = {"_core.abi3.so", "libpydflash.so", "libpydflash-ggml.so", "libpydflash-ggml-base.so"}
    assert fixed <= files
    assert files - fixed
    assert all(re.fullmatch(r"libpydflash-ggml-cpu(-\w+)?\.so", name) for name in files - fixed - {CUDA.name})


def test_compiled_parts_import_from_the_repository_root() -> None:
    code = "import _pydflash, pydflash; print(_pydflash.__file__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert Path(run.stdout.strip()).parent == PACKAGE, run.stderr


def test_import_refuses_a_library_of_another_abi(tmp_path: Path) -> None:
    package = tmp_path / "_pydflash"
    package.mkdir()
    (package / "__init__.py").write_bytes((PACKAGE / "__init__.py").read_bytes())
    (package / "_core.py").write_text(
        "class lib:\n    PF_ABI_VERSION = 7\n    pf_abi_version = staticmethod(lambda: 6)\nffi = None\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", "import _pydflash"], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "ImportError: libpydflash speaks ABI version 6, but this pydflash was built for version 7" in run.stderr


def test_backend_of_another_ggml_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "foreign.c"
    source.write_text(
        "static struct { int api_version; void * interface[8]; } reg = {2, {0}};\n"
        "void * ggml_backend_init(void) { return &reg; }\n"
    )
    foreign = tmp_path / "libggml-cpu.so"
    output_of("cc", "-shared", "-fPIC", source, "-o", foreign)
    registry = ctypes.CDLL(str(PACKAGE / "libpydflash-ggml.so"))
    registry.ggml_backend_load.restype = ctypes.c_void_p
    assert registry.ggml_backend_load(str(foreign).encode()) is None
    own = sorted(PACKAGE.glob("libpydflash-ggml-cpu*.so"))
    assert any(registry.ggml_backend_load(str(path).encode()) for path in own)


OPEN_A_MODEL = """
import sys, _pydflash
out = _pydflash.ffi.new("pf_model **")
if _pydflash.lib.pf_model_open(sys.argv[1].encode(), b"cpu", out):
    sys.exit(_pydflash.ffi.string(_pydflash.lib.pf_last_error()).decode())
print({line.split()[-1] for line in open("/proc/self/maps") if "libpydflash-ggml-cpu" in line})
"""


def test_cpu_backend_is_chosen_among_those_that_run_here(tiny_target: Path, tmp_path: Path) -> None:
    package = tmp_path / "_pydflash"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("models", "__pycache__"))
    source = tmp_path / "score.c"
    source.write_text("int ggml_backend_score(void) { return 0; }\n")
    output_of("cc", "-shared", "-fPIC", source, "-o", package / "libpydflash-ggml-cpu-future.so")
    (package / "libpydflash-ggml-cpu-broken.so").write_bytes(b"not a library")

    def open_model() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", OPEN_A_MODEL, str(tiny_target)]
        # From another folder: neither it nor the environment may lead to a backend.
        hint = {"PYTHONPATH": str(tmp_path), "GGML_BACKEND_PATH": str(PACKAGE / "libpydflash-ggml-cpu.so")}
        return subprocess.run(command, cwd=PACKAGE, env=hint, capture_output=True, text=True)

    loaded = re.findall(r"'(.*?)'", open_model().stdout)
    assert [Path(path).parent for path in loaded] == [package]
    assert Path(loaded[0]).name in {path.name for path in PACKAGE.glob("libpydflash-ggml-cpu*.so")}

    for path in PACKAGE.glob("libpydflash-ggml-cpu*.so"):
        (package / path.name).unlink()
    run = open_model()
    assert run.returncode == 1
    assert f"No CPU backend in {package} can be loaded; reinstall pydflash on this machine." in run.stderr
    assert "libpydflash-ggml-cpu-broken.so: file too short" in run.stderr
    assert "libpydflash-ggml-cpu-future.so was built for another processor." in run.stderr


# -- the overlay, on a small upstream -----------------------------------------------------------------------------

UPSTREAM = {
    "CMakeLists.txt": "set(GGML_VERSION_MAJOR 0)\nset(GGML_VERSION_MINOR 25)\nset(GGML_VERSION_PATCH 3)\n",
    "src/ggml.c": "one\ntwo\nthree\nfour\ntwo\nfive\n",
    "include/ggml.h": "enum {\n    A,\n    B,\n};\n",
}
PATCH = "--- a/src/ggml.c\n+++ b/src/ggml.c\n@@ -2,2 +2,3 @@\n two\n+two and a half\n three\n"


def archive_of(path: Path, files: dict[str, str], links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type = tarfile.SYMTYPE
            member.linkname = target
            tar.addfile(member)
    return path


def package_files(inner: dict[str, str]) -> dict[str, str]:
    return {f"llama_cpp_python-0.3.36/vendor/llama.cpp/ggml/{name}": text for name, text in inner.items()}


class Fork:
    """A ggml/ folder of ours, a cache that holds its pinned archive, and a build folder."""

    def __init__(self, root: Path) -> None:
        self.ours = root / "ggml"
        self.cache = root / "cache"
        self.into = root / "build" / "ggml-src"
        for folder in (self.ours / "patches", self.ours / "src", self.cache):
            folder.mkdir(parents=True)
        archive = archive_of(root / "upstream.tar.gz", package_files(UPSTREAM) | {"x/vendor/llama.cpp/LICENSE": "MIT"})
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        archive.rename(self.cache / f"{digest}.tar.gz")
        # --no-index: should the cached archive ever be passed over, pip has nowhere to go.
        (self.ours / "upstream.txt").write_text(f"--no-index\nnone==1.0 \\\n    --hash=sha256:{digest}\n")
        (self.ours / "patches" / "0001.patch").write_text(PATCH)
        (self.ours / "src" / "tree.c").write_text("ours\n")

    def lay_out(self, source: Path | None = None) -> None:
        fetch_upstream.lay_out(self.into, ours=self.ours, source=source, cache=self.cache)

    def files(self) -> dict[str, str]:
        paths = (p for p in self.into.rglob("*") if p.is_file() and p.name != fetch_upstream.MARKER)
        return {path.relative_to(self.into).as_posix(): path.read_text() for path in paths}


@pytest.fixture
def fork(tmp_path: Path) -> Fork:
    return Fork(tmp_path)


def test_a_folder_of_somebody_else_is_left_alone(fork: Fork) -> None:
    fork.into.mkdir(parents=True, exist_ok=True)
    (fork.into / "thesis.txt").write_text("years of work")
    with pytest.raises(fetch_upstream.OverlayError, match="name an empty folder"):
        fork.lay_out()
    assert (fork.into / "thesis.txt").read_text() == "years of work"


def test_overlay_is_upstream_patched_with_our_files(fork: Fork) -> None:
    fork.lay_out()
    patched = UPSTREAM["src/ggml.c"].replace("three", "two and a half\nthree", 1)
    assert fork.files() == UPSTREAM | {"src/ggml.c": patched, "src/tree.c": "ours\n", "LICENSE": "MIT"}


def test_overlay_rewrites_only_what_changed(fork: Fork) -> None:
    fork.lay_out()
    before = {name: (fork.into / name).stat().st_mtime_ns for name in fork.files()}
    (fork.ours / "src" / "tree.c").write_text("ours, better\n")
    (fork.ours / "src" / "more.c").write_text("more\n")
    fork.lay_out()
    after = {name: (fork.into / name).stat().st_mtime_ns for name in fork.files()}
    assert {name for name in after if after[name] != before.get(name)} == {"src/tree.c", "src/more.c"}
    (fork.ours / "src" / "more.c").unlink()
    fork.lay_out()
    assert "src/more.c" not in fork.files()


def test_folder_of_the_users_wins_and_is_left_alone(fork: Fork, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    for name, text in (UPSTREAM | {"src/mine.c": "mine\n"}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    fork.lay_out(source=folder)
    assert fork.files()["src/mine.c"] == "mine\n"
    assert "two and a half" in fork.files()["src/ggml.c"]
    assert (folder / "src" / "ggml.c").read_text() == UPSTREAM["src/ggml.c"]
    # The user's edits arrive, and going back to the pinned package leaves nothing of theirs.
    (folder / "src" / "mine.c").write_text("mine, edited\n")
    fork.lay_out(source=folder)
    assert fork.files()["src/mine.c"] == "mine, edited\n"
    fork.lay_out()
    assert "src/mine.c" not in fork.files()


def test_older_ggml_is_refused(fork: Fork, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(UPSTREAM["CMakeLists.txt"].replace("25", "24"))
    with pytest.raises(OverlayError, match=r"old holds ggml 0\.24\.3; pydflash needs 0\.25\.3 or newer\."):
        fork.lay_out(source=folder)


@pytest.mark.parametrize(
    ("patch", "sentence"),
    [
        (PATCH.replace(" three", " thirty"), r"0001\.patch:3 does not apply: its context is found nowhere in src/ggml"),
        (
            PATCH.replace("-2,2 +2,3", "-3,1 +3,2").replace(" three\n", ""),
            r"0001\.patch:3 does not apply: its context is found in 2 places in src/ggml\.c",
        ),
        (PATCH.replace("src/ggml.c", "src/gone.c"), r"0001\.patch:3 changes src/gone\.c, which upstream does not have"),
        (PATCH.replace("-2,2", "-2,3"), r"0001\.patch:\d+ ends a hunk before the lines its header counts"),
        (PATCH.replace("--- a/src/ggml.c", "--- /dev/null"), r"0001\.patch:2 creates a file"),
        ("no patch\n", r"0001\.patch holds no hunk"),
    ],
)
def test_patch_that_does_not_apply_stops_the_build(fork: Fork, patch: str, sentence: str) -> None:
    (fork.ours / "patches" / "0001.patch").write_text(patch)
    with pytest.raises(OverlayError, match=sentence):
        fork.lay_out()
    assert not fork.into.exists()


def test_patch_whose_lines_moved_applies_where_they_are_unique() -> None:
    tree = {"src/ggml.c": b"a new first line\n" + UPSTREAM["src/ggml.c"].encode()}
    fetch_upstream.apply_patch(tree, PATCH, "p")
    assert tree["src/ggml.c"] == b"a new first line\none\ntwo\ntwo and a half\nthree\nfour\ntwo\nfive\n"


LINE = st.sampled_from(["a\n", "b\n", "\n", "\x0c\n", "c\u2028c\n", "--- x\n", "+++ y\n", "@@ -1 +1 @@\n"])
LINES = st.lists(LINE, min_size=1, max_size=30)


@given(old=LINES, new=LINES, context=st.integers(1, 4))
def test_patches_written_by_difflib_apply(old: list[str], new: list[str], context: int) -> None:
    diff = "".join(difflib.unified_diff(old, new, "a/f", "b/f", n=context))
    tree = {"f": "".join(old).encode()}
    if diff:
        fetch_upstream.apply_patch(tree, diff, "p")
    assert tree["f"].decode() == "".join(new)


def test_file_of_ours_may_not_replace_upstreams(fork: Fork) -> None:
    (fork.ours / "src" / "ggml.c").write_text("ours\n")
    with pytest.raises(OverlayError, match=r"ggml/src/ggml\.c would replace a file of upstream's; write a patch"):
        fork.lay_out()


@pytest.mark.parametrize("name", ["src/../../../../evil.c", "include//../../evil.h", "src/ggml-cpu/../../../evil"])
def test_archive_entry_that_climbs_out_is_refused(tmp_path: Path, name: str) -> None:
    archive = archive_of(tmp_path / "a.tar.gz", package_files(UPSTREAM | {name: "evil"}))
    with pytest.raises(OverlayError, match=r"would leave the build folder: .*evil"):
        fetch_upstream.read_archive(archive)


def test_archive_entry_that_is_a_link_is_refused(tmp_path: Path) -> None:
    links = {"x/vendor/llama.cpp/ggml/src/ggml.h": "/etc/passwd"}
    archive = archive_of(tmp_path / "a.tar.gz", package_files(UPSTREAM), links)
    with pytest.raises(OverlayError, match=r"is not a plain file: .*src/ggml\.h"):
        fetch_upstream.read_archive(archive)


# -- the download, by pip from a local folder ---------------------------------------------------------------------

BACKEND = """
from pathlib import Path
Path({marker!r}).touch()
def prepare_metadata_for_build_wheel(folder, settings=None):
    info = Path(folder) / "tiny_upstream-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: tiny-upstream\\nVersion: 1.0\\n")
    return info.name
def build_wheel(*_):
    raise SystemExit("not asked for")
"""
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


class Shelf:
    """A folder that pip can download one source package from; `ran` tells whether any of its code has run."""

    def __init__(self, root: Path) -> None:
        self.marker = root / "ran"
        self.cache = root / "cache"
        self.requirements = root / "upstream.txt"
        files = {"backend.py": BACKEND.format(marker=str(self.marker)), "pyproject.toml": PYPROJECT}
        files["PKG-INFO"] = "Metadata-Version: 2.1\nName: tiny-upstream\nVersion: 1.0\n"
        archive = archive_of(root / "tiny_upstream-1.0.tar.gz", {f"tiny_upstream-1.0/{k}": v for k, v in files.items()})
        self.digest = hashlib.sha256(archive.read_bytes()).hexdigest()

    def get(self, digest: str) -> Path:
        self.requirements.write_text(
            f"--no-index\n--find-links {self.requirements.parent}\ntiny-upstream==1.0 --hash=sha256:{digest}\n"
        )
        archive = fetch_upstream.cached_archive(self.requirements, self.cache)
        assert isinstance(archive, Path)
        return archive


def test_download_is_cached_and_checked_again_at_every_use(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    archive = shelf.get(shelf.digest)
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == shelf.digest
    first = archive.stat().st_mtime_ns
    assert shelf.get(shelf.digest).stat().st_mtime_ns == first
    archive.write_bytes(b"damaged on disk")
    assert hashlib.sha256(shelf.get(shelf.digest).read_bytes()).hexdigest() == shelf.digest


def test_download_with_another_hash_stops_before_any_of_it_runs(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    with pytest.raises(OverlayError, match=r"pip could not download tiny-upstream==1\.0 with the hash in .*\.txt"):
        shelf.get("0" * 64)
    assert not shelf.marker.exists()
    assert list(shelf.cache.iterdir()) == []


def test_upstream_must_be_pinned_with_a_hash(tmp_path: Path) -> None:
    requirements = tmp_path / "upstream.txt"
    requirements.write_text("llama-cpp-python==0.3.36\n")
    with pytest.raises(OverlayError, match=r"must pin exactly one package with one sha256, found 0\."):
        fetch_upstream.read_pin(requirements)


def test_script_reports_failure_as_a_sentence(tmp_path: Path) -> None:
    script = ROOT / "ggml" / "fetch_upstream.py"
    command = [sys.executable, str(script), str(tmp_path / "out"), "--source", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == f"pydflash: {tmp_path} does not hold ggml: no version in its CMakeLists.txt.\n"
