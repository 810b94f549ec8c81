"""`pull` against a stand-in for the hub: what it brings, goes on with, checks and refuses.

Nothing leaves this machine.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from pydflash import _download, hub
from pydflash.errors import HubError
from pydflash.hub import Download, Pair, Source, pull
from tests.hub_server import Hub, Repo, serving, sha256

TARGET = random.Random(1).randbytes(3 << 20)
WEIGHTS = random.Random(2).randbytes(2 << 20)
CONFIG = json.dumps({"architectures": ["DFlashDraftModel"]}).encode()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(_download, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(_download, "BLOCK", 1 << 16)
    monkeypatch.setattr(_download, "REPORT_EVERY", 0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with serving() as running:
        running.repos = {
            "them/T-GGUF": Repo({"README.md": b"hello", "T-Q4_K_M.gguf": TARGET, "mmproj-F16.gguf": b"m" * 2000}),
            "lab/T-DFlash": Repo({"config.json": CONFIG, "model.safetensors": WEIGHTS, "dflash.py": b"x"}, "d" * 40),
        }
        monkeypatch.setitem(
            hub.KNOWN, "tiny", (Source("them/T-GGUF", "c" * 40, "T-Q4_K_M.gguf"), Source("lab/T-DFlash"))
        )
        huggingface_hub.close_session()
        yield running
        huggingface_hub.close_session()


def refused(server: Hub, name: str | Path, **options: Any) -> HubError:
    with pytest.raises(HubError) as caught:
        pull(name, endpoint=server.endpoint, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def incomplete(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").rglob("*.incomplete"))


# ---- what it brings ----------------------------------------------------------------------------------------------


def test_a_known_pair(server: Hub, tmp_path: Path) -> None:
    seen: list[Download] = []
    pair = pull("Tiny", endpoint=server.endpoint, progress=seen.append)
    assert pair.target.name == "T-Q4_K_M.gguf"
    assert pair.target.read_bytes() == TARGET
    assert pair.draft is not None
    assert {path.name: path.read_bytes() for path in pair.draft.iterdir()} == {
        "config.json": CONFIG, "model.safetensors": WEIGHTS
    }  # fmt: skip
    # Progress: the whole is known from the start, and reached.
    total = len(TARGET) + len(CONFIG) + len(WEIGHTS)
    assert {one.n_total for one in seen} == {total}
    assert [one.n_done for one in seen] == sorted(one.n_done for one in seen)
    assert (seen[-1].n_done, seen[-1].seconds_left) == (total, 0.0)
    assert seen[-1].bytes_per_second > 0
    # It is huggingface_hub's own cache: it finds everything there by itself.
    for repo, file, path in (
        ("them/T-GGUF", "T-Q4_K_M.gguf", pair.target), ("lab/T-DFlash", "config.json", pair.draft / "config.json")
    ):  # fmt: skip
        revision = "c" * 40 if repo == "them/T-GGUF" else "main"
        assert huggingface_hub.try_to_load_from_cache(repo, file, revision=revision) == str(path)
    assert {repo.repo_id for repo in huggingface_hub.scan_cache_dir(tmp_path / "cache").repos} == {
        "them/T-GGUF", "lab/T-DFlash"
    }  # fmt: skip
    assert not incomplete(tmp_path)
    # Xet was offered, and not taken up.
    assert not server.asked("GET", "xet")


def test_what_is_there_is_not_fetched_again(server: Hub) -> None:
    pair = pull("tiny", endpoint=server.endpoint)
    server.requests.clear()
    assert pull("tiny", endpoint=server.endpoint) == pair
    assert not server.asked("GET", "storage")
    # Of a commit nothing is asked at all; a branch may have moved.
    assert all("T-DFlash" in path for _, path, _ in server.requests)
    server.requests.clear()
    assert pull("tiny", endpoint=server.endpoint, local_files_only=True) == pair
    assert not server.requests


def test_a_branch_that_moves(server: Hub) -> None:
    first = pull("them/T-GGUF", endpoint=server.endpoint)
    server.repos["them/T-GGUF"] = Repo({"T-Q4_K_M.gguf": TARGET[::-1]}, "e" * 40)
    second = pull("them/T-GGUF", endpoint=server.endpoint)
    assert (first.target.read_bytes(), second.target.read_bytes()) == (TARGET, TARGET[::-1])
    assert pull("them/T-GGUF", endpoint=server.endpoint, local_files_only=True) == second
    assert pull(f"them/T-GGUF@{'c' * 40}", endpoint=server.endpoint, local_files_only=True) == first


def test_when_the_hub_cannot_be_reached(server: Hub) -> None:
    pair = pull("tiny", endpoint=server.endpoint)
    nowhere = "http://127.0.0.1:9"
    assert pull("tiny", endpoint=nowhere) == pair
    with pytest.raises(HubError, match=r"http://127.0.0.1:9 cannot be reached: .+") as caught:
        pull("a/b", endpoint=nowhere)
    assert caught.value.reason == "network"
    assert refused(server, "a/b", local_files_only=True).reason == "offline"


def test_a_pair_of_ones_own_choosing(server: Hub, tmp_path: Path) -> None:
    server.repos["me/draft"] = Repo({"a.gguf": b"g" * 5000, "sub/b.gguf": b"h" * 6000})
    pair = pull("them/T-GGUF:Q4_K_M", draft="me/draft@main:sub/b.gguf", endpoint=server.endpoint)
    assert pair.draft is not None
    assert (pair.target.read_bytes(), pair.draft.read_bytes()) == (TARGET, b"h" * 6000)
    # Paths are taken as they are.
    (tmp_path / "mine.gguf").touch()
    own = pull(tmp_path / "mine.gguf", draft="lab/T-DFlash", endpoint=server.endpoint)
    assert own.target == tmp_path / "mine.gguf"
    assert own.draft is not None
    assert (own.draft / "model.safetensors").read_bytes() == WEIGHTS
    assert pull(tmp_path / "mine.gguf") == Pair(tmp_path / "mine.gguf", None)


def test_known_pair_with_another_file(server: Hub) -> None:
    server.repos["them/T-GGUF"].files["T-Q8_0.gguf"] = b"8" * 4000
    assert pull("tiny:q8_0", endpoint=server.endpoint).target.read_bytes() == b"8" * 4000
    assert refused(server, "tiny", revision="v2").reason == "missing"


def test_drafter_in_shards(server: Hub) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    shards = {name: os.urandom(2000) for name in index["weight_map"].values()}
    listed = {"config.json": CONFIG, "model.safetensors.index.json": json.dumps(index).encode()}
    server.repos["lab/T-DFlash"].files = listed | shards
    draft = pull("tiny", endpoint=server.endpoint).draft
    assert draft is not None
    assert {path.name for path in draft.iterdir()} == (listed | shards).keys()
    # Half of it in the cache is not all of it.
    (draft / "model-00002-of-00002.safetensors").unlink()
    assert refused(server, "tiny", local_files_only=True).reason == "offline"
    assert pull("tiny", endpoint=server.endpoint).draft == draft


def test_the_table_of_known_pairs() -> None:
    assert set(hub.KNOWN) == {"qwen3.5-4b", "qwen3.5-9b", "qwen3.5-27b", "qwen3.6-27b"}
    for name, (target, draft) in hub.KNOWN.items():
        size = name.replace("qwen", "Qwen").replace("b", "B")
        assert size in target.repo
        assert target.file == f"{size}-Q4_K_M.gguf"
        assert draft == Source(f"z-lab/{size}-DFlash", draft.revision)
        assert hub.COMMIT.fullmatch(target.revision or "")
        assert hub.COMMIT.fullmatch(draft.revision or "")


# ---- the connection breaks ---------------------------------------------------------------------------------------


def test_goes_on_after_a_cut(server: Hub) -> None:
    server.cuts = [1_000_000, 0, 500_000]
    seen: list[Download] = []
    assert pull("them/T-GGUF", endpoint=server.endpoint, progress=seen.append).target.read_bytes() == TARGET
    first, *rest = [headers.get("range") for headers in server.asked("GET", "storage")]
    assert first is None
    assert all(isinstance(asked, str) for asked in rest)
    assert seen[-1].n_done == len(TARGET)


def test_goes_on_in_another_call(server: Hub, tmp_path: Path) -> None:
    def stop(now: Download) -> None:
        if now.n_done > 1 << 20:
            raise BrokenPipeError("enough")

    with pytest.raises(BrokenPipeError, match="enough"):
        pull("them/T-GGUF", endpoint=server.endpoint, progress=stop)
    (partial,) = incomplete(tmp_path)
    here = partial.stat().st_size
    assert here > 1 << 20
    server.requests.clear()
    seen: list[Download] = []
    assert pull("them/T-GGUF", endpoint=server.endpoint, progress=seen.append).target.read_bytes() == TARGET
    assert [headers["range"] for headers in server.asked("GET", "storage")] == [f"bytes={here}-"]
    assert seen[0].n_done >= here
    assert seen[-1].n_done == len(TARGET)


def test_begins_anew_where_it_cannot_go_on(server: Hub) -> None:
    server.cuts, server.ranges = [1_000_000], False
    seen: list[Download] = []
    assert pull("them/T-GGUF", endpoint=server.endpoint, progress=seen.append).target.read_bytes() == TARGET
    assert seen[-1].n_done == len(TARGET)


def test_what_is_left_of_another_file_is_not_built_upon(server: Hub, tmp_path: Path) -> None:
    blobs = tmp_path / "cache" / "models--them--T-GGUF" / "blobs"
    blobs.mkdir(parents=True)
    partial = blobs / f"{sha256(TARGET)}.incomplete"
    partial.write_bytes(bytes(len(TARGET) + 1))  # longer than the file
    assert pull("them/T-GGUF", endpoint=server.endpoint).target.read_bytes() == TARGET
    (blobs / sha256(TARGET)).unlink()
    partial.write_bytes(bytes(1000))  # other bytes: the check finds them
    assert refused(server, "them/T-GGUF").reason == "damaged"
    assert not partial.exists()
    assert pull("them/T-GGUF", endpoint=server.endpoint).target.read_bytes() == TARGET


def test_a_server_that_is_busy_for_a_while(server: Hub) -> None:
    server.statuses = [503, 429, 500]
    assert pull("them/T-GGUF", endpoint=server.endpoint).target.read_bytes() == TARGET


def test_a_server_that_never_recovers(server: Hub, tmp_path: Path) -> None:
    server.cuts = [1_000_000] + [0] * 50
    error = refused(server, "them/T-GGUF")
    assert error.reason == "network"
    assert "run it again to go on from there" in str(error)
    assert incomplete(tmp_path)[0].stat().st_size > 0
    server.statuses, server.cuts = [503] * 50, []
    assert "the answer was 503" in str(refused(server, "them/T-GGUF"))


# ---- what must not come in ---------------------------------------------------------------------------------------


def test_wrong_bytes_are_deleted(server: Hub, tmp_path: Path) -> None:
    server.damage = True
    error = refused(server, "them/T-GGUF")
    assert error.reason == "damaged"
    assert sha256(TARGET) in str(error)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 1000] == []
    server.damage, server.extra = False, b"more"
    assert "longer than" in str(refused(server, "them/T-GGUF"))
    server.extra = b""
    assert pull("them/T-GGUF", endpoint=server.endpoint).target.read_bytes() == TARGET


def test_small_files_are_checked_too(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = _download.RemoteFile("config.json", len(CONFIG), "a" * 40)
    monkeypatch.setattr(hub, "_remote_files", lambda info: iter([listing]))
    monkeypatch.setattr(hub, "_choose", lambda source, sizes, of_drafter: (None, ["config.json"]))
    assert "SHA-1" in str(refused(server, "lab/T-DFlash"))


def test_hostile_listings(server: Hub, tmp_path: Path) -> None:
    server.repos["them/T-GGUF"].files = {"../../evil.gguf": TARGET}
    assert refused(server, "them/T-GGUF").reason == "missing"
    for answer in (
        b"<html>log in to the wifi</html>",
        b"[]",
        b"{}",
        b'{"sha":"x","siblings":[{"rfilename":"a.gguf"}]}',
    ):
        server.answer = answer
        error = refused(server, "them/T-GGUF")
        assert (error.reason, "does not answer as a hub" in str(error)) == ("network", True)


# ---- what it refuses ---------------------------------------------------------------------------------------------


def test_names(server: Hub, tmp_path: Path) -> None:
    assert (
        str(refused(server, "qwen3.5-27"))
        == "no pair is called 'qwen3.5-27', and there is no such file, did you mean 'qwen3.5-27b'?"
    )
    assert "owner/repo" in str(refused(server, "zzz"))
    assert refused(server, "a b/c").reason == "name"
    assert refused(server, "a--b/c").reason == "name"
    assert refused(server, "https://example.org/x").reason == "name"
    assert refused(server, tmp_path / "none.gguf").reason == "missing"
    assert refused(server, "tiny", draft="x").reason == "name"
    assert not server.requests


def test_choices(server: Hub) -> None:
    files = server.repos["them/T-GGUF"].files
    files.update(
        {"T-Q6_K.gguf": b"6" * 2000, "T-BF16-00001-of-00002.gguf": b"1" * 9, "T-BF16-00002-of-00002.gguf": b"2" * 9}
    )
    error = refused(server, "them/T-GGUF")
    assert error.reason == "ambiguous"
    assert "T-Q4_K_M.gguf (0.0 GB), T-Q6_K.gguf" in str(error)
    assert "mmproj" not in str(error)
    for name in ("T-BF16-00001-of-00002.gguf", "BF16"):
        error = refused(server, f"them/T-GGUF:{name}")
        assert error.reason == "sharded"
        assert "one of 2 parts" in str(error)
    error = refused(server, "them/T-GGUF:Q2_K")
    assert error.reason == "missing"
    assert "T-Q6_K.gguf" in str(error)
    assert "give it as draft" in str(refused(server, "lab/T-DFlash"))
    assert refused(server, "them/T-GGUF:Q6_K", draft="nobody/nothing").reason == "missing"
    assert not server.asked("GET", "storage")


def test_access(server: Hub) -> None:
    assert "is not on http://127.0.0.1" in str(refused(server, "them/other"))
    assert "no revision v9" in str(refused(server, "them/T-GGUF@v9"))
    server.repos["them/T-GGUF"].gated = True
    error = refused(server, "them/T-GGUF")
    assert error.reason == "gated"
    assert f"accept its conditions at {server.endpoint}/them/T-GGUF" in str(error)
    server.repos["them/T-GGUF"].private = True
    assert refused(server, "them/T-GGUF").reason == "missing"
    server.requests.clear()
    assert pull("them/T-GGUF", endpoint=server.endpoint, token=server.token).target.read_bytes() == TARGET
    # The token is for the hub; where it sends us is another's.
    assert all(headers.get("authorization") == "Bearer secret" for headers in server.asked("GET", "resolve"))
    stored = server.asked("GET", "storage")
    assert stored
    assert all("authorization" not in headers for headers in stored)
    server.statuses = [403]
    shutil.rmtree(constants.HF_HUB_CACHE)
    assert refused(server, "them/T-GGUF", token=server.token).reason == "unauthorized"


def test_no_room(server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, hub.MARGIN + len(TARGET) - 1))
    error = refused(server, "them/T-GGUF")
    assert (error.reason, error.path) == ("space", str(tmp_path / "cache"))
    assert not server.asked("GET", "storage")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, hub.MARGIN + len(TARGET)))
    pull("them/T-GGUF", endpoint=server.endpoint)


def test_the_disk_fills_up_on_the_way(server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The kernel's own refusal: no file may grow past a megabyte.
    import resource
    import signal

    before, old = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        error = refused(server, "them/T-GGUF")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert (error.reason, "File too large" in str(error)) == ("disk", True)
    full = OSError(28, os.strerror(28))
    assert "the disk is full" in str(_download.disk_sentence(full, tmp_path))
    assert pull("them/T-GGUF", endpoint=server.endpoint).target.read_bytes() == TARGET


def test_a_cache_that_cannot_be_written(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    assert refused(server, "them/T-GGUF").reason == "disk"


def test_two_at_once(server: Hub) -> None:
    busy: list[HubError] = []

    def meanwhile(now: Download) -> None:
        if not busy and 0 < now.n_done < now.n_total:
            busy.append(refused(server, "them/T-GGUF"))

    assert pull("them/T-GGUF", endpoint=server.endpoint, progress=meanwhile).target.read_bytes() == TARGET
    assert [error.reason for error in busy] == ["busy"]
    # And when they do not get into each other's way.
    shutil.rmtree(constants.HF_HUB_CACHE)
    results: list[object] = []

    def one() -> None:
        try:
            results.append(pull("them/T-GGUF", endpoint=server.endpoint).target.read_bytes())
        except HubError as error:
            results.append(error.reason)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert TARGET in results
    assert set(results) <= {TARGET, "busy"}


def test_the_environment_alone(server: Hub, tmp_path: Path) -> None:
    code = (
        "from pydflash.hub import pull; import sys; print(pull(sys.argv[1], local_files_only=len(sys.argv) > 2).target)"
    )
    environment = os.environ | {
        "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)
    }  # fmt: skip

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=environment | more,
            capture_output=True,
            text=True,
            check=False,
        )

    done = run("them/T-GGUF")
    assert Path(done.stdout.strip()).read_bytes() == TARGET
    assert done.stdout.startswith(str(tmp_path / "home" / "hub"))
    assert run("them/T-GGUF", HF_HUB_OFFLINE="1").stdout == done.stdout
    assert "HubError: a/b is not in the cache" in run("a/b", HF_HUB_OFFLINE="1").stderr
