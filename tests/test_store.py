"""A session comes back from its file as it was, or it is told why not, before anything is touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pydflash import _container, _fingerprint, models
from pydflash._fingerprint import fingerprint
from pydflash._handles import Models, draft_file
from pydflash.errors import ArgumentError, ContextFullError, ModelFileError, ModelFormatError, SessionFileError
from pydflash.store import Core, SavedSession, restore_into, save_session
from tests.test_timeline_core import Core as Timeline
from tests.tiny_models import TinyDraft, TinyTarget

PROMPT = [int(i) for i in np.random.default_rng(7).integers(0, 280, 150)]
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "seed": 5}
SAID = [{"role": "user", "content": "ä\ud800"}]


class Opener:
    """Opens timelines on one pair of models, as `Core` wants them."""

    def __init__(self) -> None:
        self.lines: list[Timeline] = []

    def __call__(self, target: Path, draft: Path | None, **fields: Any) -> tuple[Timeline, Core]:
        pair = Models(target, draft, "cpu")
        self.lines.append(Timeline(pair, **fields))
        return self.lines[-1], Core(self.lines[-1].session, pair)


@pytest.fixture
def opened() -> Iterator[Opener]:
    opener = Opener()
    yield opener
    for line in opener.lines:
        line.handles.free()


def snapshot(line: Timeline) -> tuple[int, Any]:
    return line.n_committed, np.frombuffer(line.state(), np.uint8)


def save(path: Path, core: Core, snapshots: Any = ()) -> None:
    save_session(path, core, conversation=SAID, snapshots=snapshots, options={"budget": 8})


@pytest.mark.parametrize(
    ("fields", "drafted"),
    [
        ({}, True),
        ({"n_ring": 256}, True),  # the ring has come round
        ({"kv_type": ("q8_0", "q4_0")}, True),
        ({"kv_type": "f16"}, False),
    ],
)
@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_goes_on_as_if_it_had_never_been_saved(
    opened: Opener, agreeing_pair: tuple[Path, Path], tmp_path: Path, fields: Any, drafted: bool, settings: Any
) -> None:
    target, draft = agreeing_pair[0], agreeing_pair[1] if drafted else None
    line, core = opened(target, draft, **fields)
    settings = settings if drafted else {**settings, "budget": 0}
    line.configure(**settings)
    line.append(PROMPT[:100])
    kept = [snapshot(line)]
    line.append(PROMPT[100:] + PROMPT)
    line.say(7)
    kept.append(snapshot(line))
    line.say(9)
    save(tmp_path / "a.session", core, kept)
    held = line.all()
    expected = line.say(60)

    other, other_core = opened(target, draft, **fields, **({} if drafted else {"budget": 0}))
    other.configure(**settings)
    other.append([1, 2, 3])
    with SavedSession(tmp_path / "a.session") as saved:
        restore_into(other_core, saved)
        assert saved.ids.tolist() == held[0]
        assert saved.conversation == SAID
        assert saved.options == {"budget": 8}
        back = list(saved.read_snapshots())
    assert other.all() == held
    assert other.say(60) == expected
    assert [(n, state.tobytes()) for n, state in back] == [(n, state.tobytes()) for n, state in kept]
    other.rewind(kept[1][0], back[1][1].tobytes())
    other.append([held[0][kept[1][0]]])  # what was pending there
    assert other.say(9) == held[0][-9:]


def test_the_shipped_pair_goes_on(opened: Opener, tmp_path: Path) -> None:
    target, draft = models.target_path(), draft_file(models.draft_path())
    line, core = opened(target, draft, kv_type="f16")
    line.append(PROMPT)
    save(tmp_path / "a.session", core)
    other, other_core = opened(target, draft, kv_type="f16")
    with SavedSession(tmp_path / "a.session") as saved:
        restore_into(other_core, saved)
        assert saved.models["target"] == {"path": str(target), "fingerprint": fingerprint(target)}
    assert other.say(20) == line.say(20)


@pytest.mark.parametrize("ids", [[], [5], [5, 6]], ids=["empty", "one pending", "one and one"])
def test_short_timelines(opened: Opener, tiny_target: Path, tmp_path: Path, ids: list[int]) -> None:
    line, core = opened(tiny_target, None, budget=0)
    line.append(ids)
    save(tmp_path / "a.session", core)
    other, other_core = opened(tiny_target, None, budget=0)
    other.append(PROMPT)
    with SavedSession(tmp_path / "a.session") as saved:
        restore_into(other_core, saved)
    assert other.all() == line.all()


def test_nothing_pending_stays_so(opened: Opener, tiny_target: Path, tmp_path: Path) -> None:
    line, core = opened(tiny_target, None, budget=0)
    line.append(PROMPT)
    line.rewind(line.n_committed, line.state())
    save(tmp_path / "a.session", core)
    other, other_core = opened(tiny_target, None, budget=0)
    with SavedSession(tmp_path / "a.session") as saved:
        restore_into(other_core, saved)
    assert other.tokens == PROMPT[:-1]
    assert other.n_committed == 149


@pytest.fixture
def saved(opened: Opener, tiny_target: Path, tiny_draft: Path, tmp_path: Path) -> Path:
    """150 tokens of the tiny pair with two snapshots."""
    line, core = opened(tiny_target, tiny_draft)
    line.append(PROMPT[:65])
    kept = [snapshot(line)]
    line.append(PROMPT[65:130])
    kept.append(snapshot(line))
    line.append(PROMPT[130:])
    save(tmp_path / "a.session", core, kept)
    return tmp_path / "a.session"


def refused(line: Timeline, core: Core, path: Path, error: type[Exception] = SessionFileError) -> str:
    """The sentence of a refusal that leaves a timeline as it was."""
    line.reset()
    line.append([1, 2, 3])
    before = line.all()
    with pytest.raises(error) as caught, SavedSession(path) as saved:
        restore_into(core, saved)
    assert line.all() == before
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_other_settings_and_models_are_refused(
    opened: Opener, tiny_target: Path, tiny_draft: Path, saved: Path, tmp_path: Path
) -> None:
    def refusal(target: Path = tiny_target, draft: Path | None = tiny_draft, **fields: Any) -> str:
        return refused(*opened(target, draft, **fields), saved)

    assert "was saved with kv_type=['f32', 'f32'], but this session has kv_type=['f16', 'f32']" in refusal(
        kv_type=("f16", "f32")
    )
    assert "n_ring=4096, but this session has n_ring=300" in refusal(n_ring=300)
    assert "n_batch=64, but this session has n_batch=128" in refusal(n_batch=128)
    assert "was saved with a draft, but this session has none" in refusal(draft=None, budget=0)
    other = TinyTarget(seed=1).write(tmp_path / "other.gguf")
    assert f"was saved with another target than {other}: with {tiny_target}" in refusal(target=other)
    other = TinyDraft.of(TinyTarget(), seed=1).write(tmp_path / "draft.gguf")
    assert f"was saved with another draft than {other}" in refusal(draft=other)

    line, core = opened(tiny_target, tiny_draft, n_ctx=149)
    assert "holds 150 tokens, 1 too many for n_ctx=149" in refused(line, core, saved, ContextFullError)
    shutil.copy(tiny_target, tmp_path / "same.gguf")  # elsewhere, but the same
    line, core = opened(tmp_path / "same.gguf", tiny_draft, n_ctx=150, n_threads=2, budget=3)
    with SavedSession(saved) as file:
        restore_into(core, file)
    assert line.tokens == PROMPT


def test_without_a_drafter_is_not_with_one(opened: Opener, tiny_target: Path, tiny_draft: Path, tmp_path: Path) -> None:
    line, core = opened(tiny_target, None, budget=0)
    line.append(PROMPT)
    save(tmp_path / "a.session", core)
    assert "was saved without a draft, but this session has one" in refused(
        *opened(tiny_target, tiny_draft), tmp_path / "a.session"
    )


def test_damage_in_any_section_is_noticed_before_anything_is_touched(
    opened: Opener, tiny_target: Path, tiny_draft: Path, saved: Path
) -> None:
    line, core = opened(tiny_target, tiny_draft)
    with _container.Container(saved) as file:
        sections = list(file.sections.values())
    assert [s.name for s in sections] == [
        "ids", "conversation", "state", "snapshot.64", "snapshot.129", "kv.0", "kv.1",
    ]  # fmt: skip
    data = bytearray(saved.read_bytes())
    for section in sections:
        for at in (section.offset, section.offset + section.size // 2, section.offset + section.size - 1):
            data[at] ^= 4
            saved.write_bytes(data)
            assert section.name in refused(line, core, saved)
            data[at] ^= 4
    saved.write_bytes(data)
    with SavedSession(saved) as file:
        restore_into(core, file)
    assert line.tokens == PROMPT


def rewritten(path: Path, meta: Any = None, **sections: bytes | None) -> None:
    """Changes a file and gives it the right checksums: None drops a section."""
    with _container.Container(path) as file:
        contents = {name: file.read(name, at_most=10**8) for name in file.sections}
        said = json.loads(json.dumps(file.meta)) | (meta or {})
    contents |= {name.replace("_", "."): data for name, data in sections.items()}  # type: ignore[misc]
    rows = [_container.NewSection(name, len(data), [data]) for name, data in contents.items() if data is not None]
    _container.write(path, said, rows)


@pytest.mark.parametrize(
    "lie",
    [
        {"ids": np.array([*PROMPT[:-1], 288], np.int32).tobytes()},
        {"ids": np.array([-1, *PROMPT[1:]], np.int32).tobytes()},
        {"ids": np.array(PROMPT[1:-1], np.int32).tobytes()},
        {"ids": np.array([*PROMPT, 1], np.int32).tobytes()},
        {"ids": b"123"},
        {"ids": None},
        {"conversation": b"[" * 100_000},
        {"conversation": b"\xff"},
        {"conversation": None},
        {"state": b"1234"},
        {"state": None},
        {"snapshot_64": b""},
        {"snapshot_64": None},
        {"snapshot_3": b""},
        {"kv_1": bytes(149 * 64 * 4 - 1)},
        {"kv_1": None},
        {"kv_2": b""},
        {"meta": {"kind": "recipe"}},
        {"meta": {"n_committed": -1}},
        {"meta": {"n_committed": 2**63}},
        {"meta": {"n_committed": 148}},
        {"meta": {"n_committed": "149"}},
        {"meta": {"snapshots": [129, 64]}},
        {"meta": {"snapshots": [0, 64]}},
        {"meta": {"snapshots": [64, 1000]}},
        {"meta": {"snapshots": [64.0, 129]}},
        {"meta": {"snapshots": [64, "129"]}},
        {"meta": {"snapshots": {}}},
        {"meta": {"models": {}}},
        {"meta": {"models": {"target": 3, "draft": None}}},
        {"meta": {"models": []}},
        {"meta": {"models": {"target": {"path": 3, "fingerprint": "0"}, "draft": None}}},
        {"meta": {"settings": {}}},
        {"meta": {"settings": 3}},
        {"meta": {"options": None}},
    ],
    ids=lambda lie: str(lie)[:40],
)
def test_lies_with_the_right_checksums_are_refused(
    opened: Opener, tiny_target: Path, tiny_draft: Path, saved: Path, lie: Any
) -> None:
    rewritten(saved)
    line, core = opened(tiny_target, tiny_draft)
    with SavedSession(saved) as file:
        restore_into(core, file)  # rewriting by itself does no harm
    rewritten(saved, **lie)
    refused(line, core, saved)


def test_a_state_of_other_tokens_leaves_an_empty_session(
    opened: Opener, tiny_target: Path, tiny_draft: Path, saved: Path
) -> None:
    """That is for the core to see, which has the rows by then."""
    rewritten(saved, ids=np.array([*PROMPT[:3], 0, *PROMPT[4:]], np.int32).tobytes())
    line, core = opened(tiny_target, tiny_draft)
    line.append([1, 2, 3])
    with pytest.raises(SessionFileError, match="not that of these 149 tokens"), SavedSession(saved) as file:
        restore_into(core, file)
    assert line.tokens == []


def test_a_step_in_the_air_is_not_saved(opened: Opener, tiny_target: Path, tiny_draft: Path, saved: Path) -> None:
    line, core = opened(tiny_target, tiny_draft)
    line.append(PROMPT)
    line.step(5)
    before = saved.read_bytes()
    with pytest.raises(Exception, match="commit"):
        save(saved, core)
    assert saved.read_bytes() == before


def test_a_conversation_that_is_no_json(opened: Opener, tiny_target: Path, tmp_path: Path) -> None:
    _, core = opened(tiny_target, None, budget=0)
    with pytest.raises(ArgumentError, match=r"messages cannot be saved: .*Path"):
        save_session(tmp_path / "a", core, conversation=[tmp_path], snapshots=[], options={})
    assert list(tmp_path.iterdir()) == []


def test_what_no_path_can_be(opened: Opener, tiny_target: Path) -> None:
    _, core = opened(tiny_target, None, budget=0)
    with pytest.raises(ArgumentError, match="NUL"):
        save(Path("a\0b"), core)
    with pytest.raises(ArgumentError, match="NUL"):
        SavedSession("a\0b")


def test_a_fingerprint_sees_metadata_data_and_length(tiny_target: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    shutil.copy(tiny_target, path)
    prints = [fingerprint(tiny_target)]
    assert fingerprint(path) == prints[0]
    data = path.read_bytes()
    for changed in (
        data.replace(b"<|im_end|>", b"<|im_eng|>"),
        data.replace(b"blk.0.ffn_up", b"blk.0.ffn_uq"),
        data[:-1] + bytes([data[-1] ^ 1]),
        data + bytes(32),
    ):
        assert changed != data
        path.write_bytes(changed)
        prints.append(fingerprint(path))
    assert len(set(prints)) == 5
    with pytest.raises(ModelFileError, match="No such file"):
        fingerprint(tmp_path / "absent")
    path.write_bytes(b"GGUF")
    with pytest.raises(ModelFormatError):
        fingerprint(path)


def test_a_large_file_is_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sizes of a 16 GB file: the samples lie within the data, from its first byte to its last, evenly."""
    start, end = 11_000_000, 16_000_000_000
    samples = list(_fingerprint._samples(start, end))
    assert samples[0] == (start, start + 65536)
    assert samples[-1] == (end - 65536, end)
    assert len(samples) == 1024
    gaps = np.diff([first for first, _ in samples])
    assert gaps.max() - gaps.min() <= 1
    assert {b - a for a, b in samples} == {65536}
    assert list(_fingerprint._samples(start, start + 1024 * 65536)) == [(start, start + 1024 * 65536)]
