"""What was read once is found again, within its bound of bytes; whatever is wrong with the folder is only a miss."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pydflash.document_cache import DocumentCache
from pydflash.errors import SessionFileError
from pydflash.store import Core
from tests.test_store import Opener, snapshot
from tests.test_store import opened as opened
from tests.test_timeline_core import Core as Timeline

DOCUMENT = np.random.default_rng(8).integers(0, 280, 200).astype(np.int32)
OTHER = np.random.default_rng(9).integers(0, 280, 200).astype(np.int32)


@pytest.fixture
def pair(opened: Opener, tiny_target: Path, tiny_draft: Path) -> tuple[Timeline, Core]:
    return opened(tiny_target, tiny_draft)


def entries(cache: DocumentCache) -> dict[int, Path]:
    """By their number of tokens."""
    return {int(path.name.split("-")[1]): path for path in cache.folder.glob("*.session")}


def read(line: Timeline, ids: Any) -> None:
    line.reset()
    line.append([int(i) for i in ids])


def found(cache: DocumentCache, core: Core, ids: Any, more_than: int = 0) -> int:
    """Tokens of the entry that was restored; 0 for a miss."""
    saved = cache.restore(core, ids, more_than=more_than)
    if saved is None:
        return 0
    with saved:
        return len(saved.ids)


def test_the_longest_beginning_is_found(pair: tuple[Timeline, Core], opened: Opener, tmp_path: Path) -> None:
    line, core = pair
    cache = DocumentCache(tmp_path / "new" / "cache", 1 << 30)
    assert found(cache, core, DOCUMENT) == 0
    for n in (1, 80, 150):
        read(line, DOCUMENT[:n])
        assert cache.put(core, snapshots=[])
        read(line, OTHER[:n])
        assert cache.put(core, snapshots=[])
    read(line, DOCUMENT[:150])
    expected = line.all()

    other, other_core = opened(core.models.target, core.models.draft)
    cache = DocumentCache(cache.folder, 1 << 30)
    assert found(cache, other_core, DOCUMENT) == 150
    assert other.all() == expected
    assert found(cache, other_core, DOCUMENT, more_than=149) == 150
    assert found(cache, other_core, DOCUMENT, more_than=150) == 0
    assert other.all() == expected  # a miss leaves it alone
    assert found(cache, other_core, DOCUMENT[:150]) == 150
    assert found(cache, other_core, DOCUMENT[:149]) == 80
    assert found(cache, other_core, np.concatenate([OTHER[:100], DOCUMENT])) == 80
    assert other.tokens == OTHER[:80].tolist()
    assert found(cache, other_core, DOCUMENT[1:]) == 0


def test_snapshots_come_along(pair: tuple[Timeline, Core], tmp_path: Path) -> None:
    line, core = pair
    line.append(DOCUMENT[:65].tolist())
    kept = [snapshot(line)]
    line.append(DOCUMENT[65:].tolist())
    cache = DocumentCache(tmp_path, 1 << 30)
    cache.put(core, snapshots=kept)
    saved = cache.restore(core, DOCUMENT)
    assert saved is not None
    with saved:
        assert [(n, state.tobytes()) for n, state in saved.read_snapshots()] == [(64, kept[0][1].tobytes())]


def test_other_models_and_settings_have_other_entries(
    pair: tuple[Timeline, Core], opened: Opener, tmp_path: Path
) -> None:
    line, core = pair
    cache = DocumentCache(tmp_path / "cache", 1 << 30)
    read(line, DOCUMENT)
    cache.put(core, snapshots=[])
    for draft, fields in (
        (None, {"budget": 0}),
        (core.models.draft, {"kv_type": "f16"}),
        (core.models.draft, {"n_ring": 256}),
    ):
        assert found(cache, opened(core.models.target, draft, **fields)[1], DOCUMENT) == 0
    same = shutil.copy(core.models.target, tmp_path / "same.gguf")
    assert found(cache, opened(Path(same), core.models.draft, n_ctx=200)[1], DOCUMENT) == 200


def test_the_longest_unused_goes_when_there_is_no_room(pair: tuple[Timeline, Core], tmp_path: Path) -> None:
    line, core = pair
    read(line, DOCUMENT[:100])
    DocumentCache(tmp_path, 1 << 30).put(core, snapshots=[])
    (first,) = tmp_path.glob("*.session")
    cache = DocumentCache(tmp_path, 3 * first.stat().st_size + 3 * 8192)
    for n in (101, 102):
        read(line, DOCUMENT[:n])
        cache.put(core, snapshots=[])
    assert set(entries(cache)) == {100, 101, 102}
    assert found(cache, core, DOCUMENT[:100]) == 100  # used again, so 101 is next to go
    read(line, DOCUMENT[:103])
    assert cache.put(core, snapshots=[])
    assert set(entries(cache)) == {100, 102, 103}
    read(line, DOCUMENT[:102])
    assert cache.put(core, snapshots=[])  # it is there: putting it is using it
    read(line, DOCUMENT[:104])
    assert cache.put(core, snapshots=[])
    assert set(entries(cache)) == {102, 103, 104}
    small = DocumentCache(tmp_path, 100_000)
    read(line, DOCUMENT[:105])
    assert not small.put(core, snapshots=[])  # nothing is evicted for what will never fit
    assert set(entries(cache)) == {102, 103, 104}


def test_a_broken_entry_is_a_logged_miss(
    pair: tuple[Timeline, Core], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line, core = pair
    cache = DocumentCache(tmp_path, 1 << 30)
    for n in (100, 110, 120, 130):
        read(line, DOCUMENT[:n])
        cache.put(core, snapshots=[])
    paths = entries(cache)
    data = bytearray(paths[130].read_bytes())
    data[-5000] ^= 1
    paths[130].write_bytes(data)
    paths[120].write_bytes(paths[120].read_bytes()[:9000])
    shutil.copy(paths[100], paths[110])  # a whole file, of other tokens
    with caplog.at_level(logging.WARNING, "pydflash"):
        assert found(cache, core, DOCUMENT) == 100
    assert [record.name for record in caplog.records] == ["pydflash"] * 3
    for n, what in ((130, "checksum"), (120, "its sections end at"), (110, "holds other tokens")):
        assert any(str(paths[n]) in record.message and what in record.message for record in caplog.records)
    assert set(entries(cache)) == {100}
    assert line.tokens == DOCUMENT[:100].tolist()
    read(line, DOCUMENT[:130])
    assert cache.put(core, snapshots=[])
    assert found(cache, core, DOCUMENT) == 130


def test_a_folder_that_goes_wrong_is_logged(
    pair: tuple[Timeline, Core], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line, core = pair
    cache = DocumentCache(tmp_path / "cache", 1 << 30)
    shutil.rmtree(cache.folder)
    read(line, DOCUMENT)
    with caplog.at_level(logging.WARNING, "pydflash"):
        assert not cache.put(core, snapshots=[])
        assert found(cache, core, DOCUMENT) == 0
    assert len(caplog.records) == 2
    assert line.tokens == DOCUMENT.tolist()
    (tmp_path / "file").touch()
    with pytest.raises(SessionFileError, match=r"documents cannot be kept in .*file"):
        DocumentCache(tmp_path / "file", 1)
