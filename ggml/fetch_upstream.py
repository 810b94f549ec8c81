"""Lay our fork of ggml out in a build folder: upstream's files, our patches, our own files.

Owns where upstream comes from (the package pinned in upstream.txt, or a folder the user names), its cache, and the
overlay. It uses only the standard library and pip, since it runs before anything is built. It refuses an archive
whose hash differs from upstream.txt, an archive entry that would land outside the build folder, a patch that does not
apply exactly, and a file of ours that would replace one of upstream's (changing those is what patches are for).

The layout of this folder is the layout of the result: `src/x` lands at `src/x`, `include/x` at `include/x`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

HERE = Path(__file__).resolve().parent
ARCHIVE_ROOT = "vendor/llama.cpp/"  # inside the package, after its top folder
MINIMUM_VERSION = (0, 25, 3)  # older releases accept tensor shapes whose product wraps
MARKER = ".pydflash-fork"
OUR_FOLDERS = ("include", "src")
# Of upstream we take what the CPU and CUDA backends need; the other backends are never built.
WANTED = re.compile(r"(CMakeLists\.txt|LICENSE|cmake/.+|include/.+|src/[^/]+|src/ggml-(cpu|cuda)/.+)")

Tree = dict[str, bytes]  # path below ggml/ -> content


class OverlayError(Exception):
    """The build cannot go on; the message is one sentence for the person who builds."""


# -- where upstream comes from ------------------------------------------------------------------------------------


def read_pin(requirements: Path) -> tuple[str, str]:
    """The one pinned requirement (name==version) and its sha256."""
    text = re.sub(r"#.*", "", requirements.read_text())
    pins = re.findall(r"([\w.-]+==[\w.]+)\s*\\?\s*--hash=sha256:([0-9a-f]{64})\s", text + "\n")
    if len(pins) != 1:
        raise OverlayError(f"{requirements} must pin exactly one package with one sha256, found {len(pins)}.")
    requirement, digest = pins[0]
    return requirement, digest


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pydflash" / "upstream"


def download(requirement: str, requirements: Path, folder: Path) -> Path:
    """Fetch the archive with pip, which checks the hash before it looks inside."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--no-binary", requirement.partition("==")[0], "--require-hashes"]
    # pip then asks the archive's build backend for metadata. That backend is scikit-build-core, which builds us too:
    # where it is already here, pip need not fetch a second, unpinned copy to run.
    if importlib.util.find_spec("scikit_build_core"):
        command.append("--no-build-isolation")
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    run = subprocess.run(command, capture_output=True, text=True)
    archives = sorted(folder.glob("*.tar.gz"))
    if run.returncode != 0 or len(archives) != 1:
        raise OverlayError(
            f"pip could not download {requirement} with the hash in {requirements}; pass "
            f"-DFETCHCONTENT_SOURCE_DIR_GGML=<folder> to build from a ggml you already have. pip said:\n"
            f"{(run.stderr or run.stdout).strip()}"
        )
    return archives[0]


def cached_archive(requirements: Path, cache: Path) -> Path:
    """The pinned archive, from the cache if its hash still holds, else downloaded into it."""
    requirement, digest = read_pin(requirements)
    archive = cache / f"{digest}.tar.gz"
    if archive.is_file() and file_sha256(archive) == digest:
        return archive
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=cache)
    except OSError as error:
        raise OverlayError(f"cannot write to {cache} ({error}); set XDG_CACHE_HOME to a writable folder.") from error
    with scratch as folder:
        fetched = download(requirement, requirements, Path(folder))
        if (actual := file_sha256(fetched)) != digest:
            raise OverlayError(f"{fetched.name} has sha256 {actual}, but {requirements} pins {digest}.")
        os.replace(fetched, archive)
    return archive


def read_archive(archive: Path) -> Tree:
    """Upstream's ggml out of the package. Nothing is unpacked to disk here."""
    tree: Tree = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
                raise OverlayError(f"{archive} holds an entry that would leave the build folder: {member.name}")
            _, _, inside = member.name.partition("/")
            if not inside.startswith(ARCHIVE_ROOT) or member.isdir():
                continue
            path = inside[len(ARCHIVE_ROOT) :]
            path = path[len("ggml/") :] if path.startswith("ggml/") else path if path == "LICENSE" else ""
            if not WANTED.fullmatch(path):
                continue
            content = tar.extractfile(member) if member.isreg() else None
            if content is None:
                raise OverlayError(f"{archive} holds an entry that is not a plain file: {member.name}")
            tree[path] = content.read()
    return tree


def read_folder(folder: Path) -> Tree:
    """The user's own ggml; only read, never changed."""
    files = (path for path in folder.rglob("*") if path.is_file())
    named = ((path.relative_to(folder).as_posix(), path) for path in files)
    return {name: path.read_bytes() for name, path in named if WANTED.fullmatch(name)}


def check_version(tree: Tree, origin: str) -> None:
    cmake = tree.get("CMakeLists.txt", b"").decode(errors="replace")
    found = [re.search(rf"set\(GGML_VERSION_{part}\s+(\d+)\)", cmake) for part in ("MAJOR", "MINOR", "PATCH")]
    if not all(found):
        raise OverlayError(f"{origin} does not hold ggml: no version in its CMakeLists.txt.")
    version = tuple(int(match[1]) for match in found if match)
    if version < MINIMUM_VERSION:
        have, need = (".".join(map(str, v)) for v in (version, MINIMUM_VERSION))
        raise OverlayError(f"{origin} holds ggml {have}; pydflash needs {need} or newer.")


# -- patches ------------------------------------------------------------------------------------------------------


def lines_of(text: str) -> list[str]:
    """Lines with their ends. Unlike str.splitlines, only a newline ends one: C sources may hold form feeds."""
    return re.findall(r".*\n|.+", text)


def parse_patch(text: str, name: str) -> Iterator[tuple[str, int, int, list[str], list[str]]]:
    """Each hunk of a unified diff as (target, line in the patch, first old line, old lines, new lines)."""
    lines = lines_of(text)
    target = ""
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if line.startswith("+++ "):
            target = line[4:].split("\t")[0].strip().partition("/")[2]
            if lines[at - 2].startswith("--- /dev/null") or not target:
                raise OverlayError(f"{name}:{at} creates a file; new files belong in {HERE.name}/src or include.")
        if not line.startswith("@@ "):
            continue
        header = re.match(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@", line)
        if not header or not target:
            raise OverlayError(f"{name}:{at} is not a unified diff hunk: {line.strip()}")
        n_old, n_new = (int(count or 1) for count in header.group(2, 3))
        first_line = at
        old: list[str] = []
        new: list[str] = []
        while len(old) < n_old or len(new) < n_new:
            body = lines[at] if at < len(lines) else ""
            at += 1
            mark, rest = (body[:1], body[1:]) if body != "\n" else (" ", body)  # editors strip a lone space
            if mark not in (" ", "-", "+") or not mark:
                raise OverlayError(f"{name}:{at} ends a hunk before the lines its header counts.")
            if mark != "+":
                old.append(rest)
            if mark != "-":
                new.append(rest)
        if len(old) != n_old or len(new) != n_new or not old:
            raise OverlayError(f"{name}:{first_line} has a header that does not count its lines, or no context.")
        yield target, first_line, int(header[1]), old, new


def apply_patch(tree: Tree, text: str, name: str) -> None:
    """Apply one unified diff to the tree. A hunk must match exactly where it says or in exactly one other place."""
    moved: dict[str, int] = {}  # per file: where the last hunk was found against where it said, and what it added
    hunks = 0
    for target, line, first, old, new in parse_patch(text, name):
        if target not in tree:
            raise OverlayError(f"{name}:{line} changes {target}, which upstream does not have.")
        lines = lines_of(tree[target].decode())
        stated = first - 1 + moved.get(target, 0)
        places = [stated] if lines[stated : stated + len(old)] == old else []
        places = places or [i for i in range(len(lines) - len(old) + 1) if lines[i : i + len(old)] == old]
        if len(places) != 1:
            found = "nowhere" if not places else f"in {len(places)} places"
            raise OverlayError(f"{name}:{line} does not apply: its context is found {found} in {target}.")
        at = places[0]
        lines[at : at + len(old)] = new
        tree[target] = "".join(lines).encode()
        moved[target] = at - (first - 1) + len(new) - len(old)
        hunks += 1
    if hunks == 0:
        raise OverlayError(f"{name} holds no hunk of a unified diff.")


# -- the overlay --------------------------------------------------------------------------------------------------


def our_files(ours: Path) -> list[Path]:
    """What is laid over upstream, patches first, in the order it is applied."""
    files = [path for folder in OUR_FOLDERS for path in sorted((ours / folder).rglob("*")) if path.is_file()]
    return [*sorted((ours / "patches").glob("*.patch")), *files]


def overlay(tree: Tree, ours: Path) -> None:
    for path in our_files(ours):
        name = path.relative_to(ours).as_posix()
        if path.suffix == ".patch":
            apply_patch(tree, path.read_text(), name)
        elif name in tree:
            raise OverlayError(f"{ours.name}/{name} would replace a file of upstream's; write a patch instead.")
        else:
            tree[name] = path.read_bytes()


def write_tree(tree: Tree, into: Path) -> None:
    """Make the folder equal to the tree, touching only what differs, so that a rebuild compiles only that.

    What is not of the tree is removed, so the folder must be one that was made here: empty, or with our marker.
    """
    if into.is_dir() and any(into.iterdir()) and not (into / MARKER).is_file():
        raise OverlayError(f"{into} holds files that are not a laid-out fork; name an empty folder, or remove it.")
    tree = {**tree, MARKER: b"Made by fetch_upstream.py, which removes what it did not write.\n"}
    for name, content in tree.items():
        path = into / name
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    for path in into.rglob("*"):
        if path.is_file() and path.relative_to(into).as_posix() not in tree:
            path.unlink()


def lay_out(into: Path, *, ours: Path = HERE, source: Path | None = None, cache: Path | None = None) -> None:
    """Make `into` our fork: upstream (from `source`, else the pinned package) with `ours` laid over it."""
    stamp_file = into.with_name(into.name + ".stamp")
    stamp = hashlib.sha256()
    for path in [Path(__file__), ours / "upstream.txt", *our_files(ours)]:
        stamp.update(path.as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    # A folder of the user's can change at any time, so only the pinned package is trusted to a stamp.
    if not source and into.is_dir() and stamp_file.is_file() and stamp_file.read_text() == stamp.hexdigest():
        return
    if source:
        tree, origin = read_folder(source), str(source)
    else:
        archive = cached_archive(ours / "upstream.txt", cache or cache_folder())
        tree, origin = read_archive(archive), str(archive)
    check_version(tree, origin)
    overlay(tree, ours)
    stamp_file.unlink(missing_ok=True)
    write_tree(tree, into)
    if not source:
        stamp_file.write_text(stamp.hexdigest())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("into", type=Path, help="folder to make our fork of ggml in")
    parser.add_argument("--source", type=Path, help="an unpacked ggml to use instead of the pinned package")
    options = parser.parse_args()
    try:
        lay_out(options.into, source=options.source)
    except (OverlayError, OSError, tarfile.TarError) as error:
        print(f"pydflash: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
