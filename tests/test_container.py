"""A saved file is the old one or the new one, whole, or it is refused; whatever happens to it or to who writes it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
from pathlib import Path

import pytest

from pydflash import _container
from pydflash.errors import SessionFileError

SECTIONS = {"ids": b"\1\2\3", "empty": b"", "kv": random.Random(0).randbytes(3 * 4096), "state": bytes(range(256)) * 40}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "a.session"
    sections = [_container.NewSection(name, len(data), [data[:100], data[100:]]) for name, data in SECTIONS.items()]
    size = _container.write(path, {"n": 3, "text": "ä"}, sections)
    assert size == path.stat().st_size == 4096 * (1 + 1 + 0 + 3 + 3)
    return path


def read_all(path: Path) -> dict[str, bytes]:
    with _container.Container(path) as file:
        file.verify()
        return {name: file.read(name, at_most=10**6) for name in file.sections}


def test_comes_back(saved: Path) -> None:
    assert read_all(saved) == SECTIONS
    with _container.Container(saved) as file:
        assert file.meta == {"n": 3, "text": "ä"}
        out = bytearray(5)
        file.read_into(file.section("state"), 254, out)
        assert bytes(out) == b"\xfe\xff\x00\x01\x02"
        with pytest.raises(SessionFileError, match="no section 'no'"):
            file.section("no")
        with pytest.raises(SessionFileError, match="at most 100 make sense"):
            file.read("kv", at_most=100)
    assert os.stat(saved).st_mode & 0o777 == 0o600
    assert os.listdir(saved.parent) == [saved.name]


def test_the_file_is_what_its_head_says(saved: Path) -> None:
    """Read with nothing of ours: struct, json and hashlib."""
    data = saved.read_bytes()
    magic, version, size, digest = struct.unpack_from("<8sII32s", data)
    assert (magic, version, size) == (b"PYDFLASH", 1, 4096)
    assert hashlib.sha256(data[:16] + data[48:size]).digest() == digest
    end = size
    for name, n_bytes, checksum in json.loads(data[48:size])["sections"]:
        assert data[end : end + n_bytes] == SECTIONS[name]
        padded = (n_bytes + 4095) // 4096 * 4096
        assert hashlib.sha256(data[end : end + padded]).hexdigest() == checksum
        end += padded
    assert end == len(data)


def test_any_byte_changed_is_noticed(saved: Path) -> None:
    """Every byte of the header, and of the rest, padding included, every 13th."""
    data = saved.read_bytes()
    with saved.open("r+b", buffering=0) as file:
        for at in [*range(4096), *range(4096, len(data), 13)]:
            os.pwrite(file.fileno(), bytes([data[at] ^ (1 << at % 8)]), at)
            with pytest.raises(SessionFileError):
                read_all(saved)
            os.pwrite(file.fileno(), data[at : at + 1], at)
    assert read_all(saved) == SECTIONS


def test_a_damaged_section_is_named_and_the_others_are_not(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    data[4096 * 3] ^= 1
    saved.write_bytes(data)
    with _container.Container(saved) as file:
        assert file.read("state", at_most=10**6) == SECTIONS["state"]
        with pytest.raises(SessionFileError, match="section 'kv' at byte 8192 does not match its checksum") as caught:
            file.verify()
    assert caught.value.path == str(saved)
    assert caught.value.where == "section 'kv' at byte 8192"


def test_cut_or_lengthened_anywhere_is_noticed(saved: Path) -> None:
    data = saved.read_bytes()
    edges = {edge + by for edge in range(0, len(data) + 1, 4096) for by in (-1, 0, 1)} | {7, 8, 15, 16, 47, 48, 49}
    for size in sorted(edges - {-1, len(data)}):
        saved.write_bytes((data + b"\0")[:size])
        with pytest.raises(SessionFileError):
            _container.Container(saved)
    saved.write_bytes(data[:-4096])
    with pytest.raises(SessionFileError, match="its sections end at"):
        _container.Container(saved)


@pytest.mark.parametrize(
    "header",
    [
        {"meta": {}, "sections": [["kv", 2**62, "00"]]},
        {"meta": {}, "sections": [["kv", -4096, "00"], ["b", 4096, "00"]]},
        {"meta": {}, "sections": [["kv", 0, "00"], ["kv", 0, "00"]]},
        {"meta": {}, "sections": [["kv", True, "00"]]},
        {"meta": {}, "sections": [["kv", 1e300, "00"]]},
        {"meta": {}, "sections": [[[], 0, "00"]]},
        {"meta": {}, "sections": [7]},
        {"meta": {}, "sections": {"kv": 1}},
        {"meta": 3, "sections": []},
        {"sections": []},
        [],
        "[" * 4000,
        "9" * 4040,
        "",
    ],
)
def test_a_header_that_lies_with_the_right_checksum_is_refused(tmp_path: Path, header: object) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode().ljust(4048)
    head = struct.pack("<8sII", b"PYDFLASH", 1, 4096)
    path = tmp_path / "lie"
    path.write_bytes(head + hashlib.sha256(head + text).digest() + text)
    with pytest.raises(SessionFileError):
        _container.Container(path)


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    for name in ("pipe", "folder", "empty", "absent", "/dev/zero"):
        with pytest.raises(SessionFileError, match=name):
            _container.Container(tmp_path / name)
    for name in ("folder", "absent/file", "empty/file"):
        with pytest.raises(SessionFileError, match=f"cannot save to .*{name}"):
            _container.write(tmp_path / name, {}, [])


def test_a_failing_source_leaves_the_old_file(saved: Path) -> None:
    def fails():
        yield b"123"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _container.write(saved, {}, [_container.NewSection("a", 6, fails())])
    assert read_all(saved) == SECTIONS
    assert os.listdir(saved.parent) == [saved.name]


def test_a_link_stays_and_its_file_is_replaced(saved: Path) -> None:
    link = saved.with_name("link")
    link.symlink_to(saved.name)
    _container.write(link, {}, [])
    assert link.is_symlink()
    assert read_all(saved) == {}


def test_temporaries_of_the_dead_go_and_of_the_living_stay(saved: Path) -> None:
    dead = saved.with_name(".pydflash-0123456789abcdef.tmp")
    dead.write_bytes(b"half")
    others = saved.with_name(".pydflash-0123456789abcdef.session")
    others.touch()

    def writes():
        (living,) = saved.parent.glob(".pydflash-*.tmp")
        assert living != dead
        _container.remove_stale(saved.parent)
        assert living.exists()
        yield b"1"

    _container.write(saved, {}, [_container.NewSection("a", 1, writes())])
    assert read_all(saved) == {"a": b"1"}
    assert not dead.exists()
    assert sorted(os.listdir(saved.parent)) == sorted([saved.name, others.name])
