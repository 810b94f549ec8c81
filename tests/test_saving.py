"""Sessions are saved by programs that are killed, on full disks, by two programs at once, and damaged anywhere: what is
there afterwards is a whole session, or a sentence."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pydflash import Session, SessionFileError
from tests.test_store import rewritten

SAVING = Path(__file__).with_name("saving_child.py")
SHARING = Path(__file__).with_name("sharing_child.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(SAVING.parents[1]), *sys.path]))}


def save_in_child(*arguments: object, prefix: tuple[str, ...] = ()) -> dict[str, object]:
    command = [*prefix, sys.executable, str(SAVING), *map(str, arguments)]
    child = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert child.returncode == 0, child.stderr
    answer: dict[str, object] = json.loads(child.stdout)
    return answer


def test_killed_at_any_moment_the_old_file_or_the_new_one_is_there(tiny_target: Path, tmp_path: Path) -> None:
    answer = save_in_child(tiny_target, tmp_path / "a.session", "kill", 200)
    assert int(str(answer["middle"])) >= 50  # savers that were killed with a half-written file in their hands
    assert answer["files"] == ["a.session"]


def test_a_size_limit_leaves_the_old_file(tiny_target: Path, tmp_path: Path) -> None:
    answer = save_in_child(tiny_target, tmp_path / "a.session", "limit")
    assert "File too large; what was there before is untouched" in str(answer.pop("error"))
    assert answer == {"tokens": 5, "files": ["a.session"]}


def test_a_full_disk_leaves_the_old_file(tiny_target: Path, tmp_path: Path) -> None:
    mount = f'mount -t tmpfs -o size=128k none {tmp_path} && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", mount, "sh")
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("a small filesystem cannot be mounted here")
    answer = save_in_child(tiny_target, tmp_path / "a.session", "full", prefix=prefix)
    error = str(answer.pop("error"))
    assert "No space left on device" in error
    assert "are free); what was there before is untouched" in error
    assert answer == {"tokens": 5, "files": ["a.session"]}


@pytest.fixture(scope="module")
def saved(tiny_target: Path, tiny_draft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "a.session"
    with Session(tiny_target, tiny_draft, kv_type="f32", n_threads=1, n_batch=64, checkpoint_every=64) as session:
        session.append(list(range(150)))
        session.save(path)
    return path


def test_any_byte_changed_is_refused(saved: Path) -> None:
    """Every byte of the header, and one at random on each page of the rest."""
    data = saved.read_bytes()
    rng = random.Random(0)
    rest = [page + rng.randrange(4096) for page in range(4096, len(data), 4096)]
    with saved.open("r+b", buffering=0) as file:
        for at in [*range(4096), *rest]:
            os.pwrite(file.fileno(), bytes([data[at] ^ (1 << at % 8)]), at)
            with pytest.raises(SessionFileError, match=r"a\.session"):
                Session.load(saved, n_threads=1)
            os.pwrite(file.fileno(), data[at : at + 1], at)
    with Session.load(saved, n_threads=1) as session:
        assert session.tokens == list(range(150))


def test_a_file_cut_anywhere_is_refused(saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    cut = tmp_path / "cut.session"
    for size in [0, 1, 47, 48, *range(4096, len(data), 4096), len(data) - 1, len(data) + 1]:
        cut.write_bytes((data + b"\0")[:size])
        with pytest.raises(SessionFileError, match=r"cut\.session"):
            Session.load(cut, n_threads=1)


@pytest.mark.parametrize(
    "conversation",
    [3, [], {}, {"raw": 3}, {"raw": ["a"], "messages": [], "turns": []}, {"raw": [], "messages": [1], "turns": []},
     {"raw": [], "messages": [{"role": 1}], "turns": []}, {"raw": [], "messages": [], "turns": [[1]]}],
)  # fmt: skip
def test_a_conversation_that_cannot_be_is_refused(saved: Path, tmp_path: Path, conversation: object) -> None:
    path = tmp_path / "a.session"
    shutil.copy(saved, path)
    rewritten(path, conversation=json.dumps(conversation).encode())
    with pytest.raises(SessionFileError, match=r"a\.session holds messages that cannot be"):
        Session.load(path, n_threads=1)


def test_a_document_of_the_cache_is_a_session_too(tiny_target: Path, tiny_draft: Path, tmp_path: Path) -> None:
    options = {"kv_type": "f32", "n_threads": 1, "n_batch": 64, "checkpoint_every": 64}
    ids = list(range(150))
    with Session(tiny_target, tiny_draft, cache_dir=tmp_path, **options) as session:
        expected = session.generate(ids, max_tokens=9, ignore_eos=True).ids
    (entry,) = tmp_path.glob("*.session")
    with Session.load(entry, n_ctx=200, n_threads=1) as session:
        assert session.tokens == ids
        assert session.generate(None, max_tokens=9, ignore_eos=True).ids == expected
        session.rewind(64)
        assert session.tokens == ids[:64]


def test_two_programs_share_a_folder_of_documents(tiny_target: Path, tiny_draft: Path, tmp_path: Path) -> None:
    """Both read, store and evict without pause; each says what it would have said alone, and logs nothing."""
    command = [sys.executable, str(SHARING), str(tiny_target), str(tiny_draft), str(tmp_path), "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    children = [subprocess.Popen([*command, seed], **pipes) for seed in "12"]
    for child in children:
        out, errors = child.communicate(timeout=100)
        assert child.returncode == 0, errors
        n_found, n_missed, most = map(int, out.split())
        assert min(n_found, n_missed) > 0
    entries = list(tmp_path.glob("*.session"))
    assert 1 < len(entries) < 8
    assert sum(entry.stat().st_size for entry in entries) <= most
    assert not list(tmp_path.glob("*.tmp"))
