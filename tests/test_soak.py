"""The soak, for seconds instead of an hour: that it takes every kind of turn, and sees growth."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.scripts import ROOT, load_script


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return load_script("scripts/soak.py")


def test_growth_is_what_the_warm_up_did_not_see(soak: ModuleType) -> None:
    assert soak.grown([5.0, 9.0, 8.0, 12.0, 11.0], 2) == 3.0
    assert soak.grown([5.0, 9.0, 8.0], 2) == -1.0


@pytest.mark.parametrize(("bound", "status"), [("1000", 0), ("-1000", 1)])
def test_a_short_one(soak: ModuleType, bound: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main(["--minutes", "0.02", f"--bound={bound}", "--device", "cpu"]) == status
    out = capsys.readouterr().out
    assert out.count("MiB of session buffers") == 10
    for kind in ("append", "ask", "leave", "cancel", "keep", "rewind", "fork", "save and load"):
        assert f" {kind}" in out.splitlines()[-2]
    assert "memory in use grew by" in out
