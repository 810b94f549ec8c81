"""The README's Python runs as it stands there, on the pair that ships."""

from __future__ import annotations

import inspect
import re
import shutil
import types
from pathlib import Path
from typing import Any

import pytest

import pydflash

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(README, tmp_path)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert "tokens were held already" in capsys.readouterr().out


def public_things() -> dict[str, Any]:
    """Everything that the package exports, and what users call on its classes; fields are their class's to tell of."""
    things = {}
    for name in pydflash.__all__:
        things[name] = thing = getattr(pydflash, name)
        if isinstance(thing, type):
            for base in thing.__mro__:
                if base.__module__.startswith("pydflash"):
                    for member, value in vars(base).items():
                        if not member.startswith("_") and isinstance(
                            value, (types.FunctionType, property, classmethod)
                        ):
                            things.setdefault(f"{name}.{member}", value)
    return things


@pytest.mark.parametrize("name", sorted(public_things()))
def test_every_public_name_says_what_it_is(name: str) -> None:
    assert inspect.getdoc(public_things()[name]), name
