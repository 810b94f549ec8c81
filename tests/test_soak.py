"""The soak, for seconds instead of an hour: that it takes every kind of turn, and sees growth."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.scripts import ROOT, load_script


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return load_script("scripts/soak.py")


def test_a_slope_is_bytes_a_turn(soak: ModuleType) -> None:
    assert soak.slope([10, 20, 40], [7.0, 8.0, 10.0]) == pytest.approx(2**20 / 10)
    assert soak.slope([10, 20, 40], [7.0, 7.0, 7.0]) == 0.0


@pytest.mark.parametrize(("most", "status"), [("1e9", 0), ("-1e9", 1)])
def test_a_short_one(soak: ModuleType, most: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main(["--minutes", "0.02", f"--allocated={most}", "--resident=1e9", "--device", "cpu"]) == status
    *lines, kinds, _, allocated, resident = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert all("MiB allocated" in line for line in lines)
    for kind in ("append", "ask", "leave", "cancel", "keep", "rewind", "hold", "document", "fork", "save and load",
                 "keep on disk"):  # fmt: skip
        assert f" {kind}" in kinds
    assert "MiB allocated" in allocated
    assert "MiB resident" in resident
