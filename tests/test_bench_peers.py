"""scripts/bench_peers.py: ratios of engines whose speeds are known, wrong answers, processes that stand still or die.

The engines are fakes that answer as they are told; ours takes part once, and llama.cpp's where xllamacpp is installed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pydflash
from pydflash import models
from pydflash.bench.answers import WrongAnswerError
from pydflash.bench.prompts import Prompt
from tests.scripts import ROOT, load_script

sys.path.insert(0, str(ROOT / "scripts"))  # as Python does for a script that is run

from peers import engines, sides, summary
from peers.engines import EngineError, LinesEngine, LlamaCpp, Setup
from peers.sides import ENGINE, PEER, PLAIN, PLAIN_ENGINE, Arm, Case

FAKE = ROOT / "tests" / "fake_engine.py"
SETUP = Setup(models.target_path(), None, 256, 1)
PROMPTS = {(1, 2, 3): "code", (4, 5): "chat"}
TEXTS = {"1,2,3": [7, 8, 9, 10], "4,5": [11, 12, 13, 14], "1,1,1,1": [0]}
CASES = [Case(Prompt(category, 0, ids), 0, ids) for ids, category in PROMPTS.items()]
ARMS = [
    Arm(PEER, PEER, reads=True),
    Arm(PLAIN, PLAIN_ENGINE, reads=True),
    Arm(f"{PEER} chain 3", f"{PEER} chain 3", reads=True),
    Arm("chain 3", ENGINE, {"budget": 3}, reads=True),
    Arm("auto", ENGINE, {"budget": "auto"}),
]
SPEEDS = {PEER: 0.010, PLAIN_ENGINE: 0.008, f"{PEER} chain 3": 0.020, ENGINE: 0.005}  # seconds of a token


Start = Callable[..., LinesEngine]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts fakes, and ends them."""
    started = []

    def start(**told: Any) -> LinesEngine:
        told = {"texts": TEXTS, "prefill": 0.001, "decode": 0.01, **told}
        engine = LinesEngine([sys.executable, str(FAKE), json.dumps(told)], SETUP, tmp_path / "log")
        started.append(engine)
        return engine

    yield start
    for engine in started:
        engine.close()


@pytest.mark.parametrize("together", [True, False])
def test_ratios_are_those_of_the_engines(start: Start, together: bool) -> None:
    def open_engine(name: str) -> LinesEngine:
        accept = 2 if name == ENGINE else 1
        return start(decode=SPEEDS[name], accept=accept, prefill=SPEEDS[name] / 10)

    found = sides.measure(open_engine, ARMS, CASES, [[1] * 4], n_gen=4, rounds=3, together=together)
    assert len(found.runs) == len(ARMS) * len(CASES) * 3
    rows = {row["what"]: row for row in summary.as_data(found)["aims"]}
    expected = {
        "plain to llama.cpp's plain": 10 / 8,
        f"prefill, {PLAIN_ENGINE} to {PEER}": 10 / 8,
        f"prefill, {ENGINE} to {PEER} chain 3": 20 / 5,
        f"chain 3 to {PEER} chain 3": 20 / 5,
        "auto to the better of llama.cpp's, each category": 10 / 5,
        "auto to the better of llama.cpp's, code": 10 / 5,
        "auto to plain, each category": 8 / 5,
    }
    for what, ratio in expected.items():
        assert rows[what]["found"], what
        assert all(value["median"] == pytest.approx(ratio) for value in rows[what]["found"].values()), what
    table = {row[0]: row for row in summary.passes(found, found.runs).rows}
    assert table["auto"][3] == "2.00"  # tokens a pass
    assert table["auto"][5] == "10.000"  # ms a pass
    assert all(row[6] == "2 of 2" for row in table.values())
    assert len({row[7] for row in table.values()}) == 1, "the hash of what was said"
    by_category = {row[0]: row for row in summary.speeds(found.runs).rows}
    assert by_category["code"][1] == "100"
    assert by_category["all"][-1] == "1.60 (1.60-1.60)"
    assert {"peak", "anonymous", "files"} == set(found.memory[PEER])


def test_an_arm_that_says_something_else_fails(start: Start) -> None:
    """In another round, or where the shipped target itself is asked whether it could choose."""
    with pydflash.Session(n_ctx=256, n_threads=1, kv_type="f16") as session:
        ids = session.tokenize("def fibonacci(n):\n")
        plain = session.generate(ids, max_tokens=4, budget=0, temperature=0, ignore_eos=True).ids
        likely = session.generate(ids, max_tokens=1, budget=0, temperature=0, logprobs=2).logprobs
        assert likely is not None
        cases = [Case(Prompt("code", 0, ids), 0, ids)]
        arms = [Arm(PLAIN, PLAIN_ENGINE), Arm(PEER, PEER)]
        key = ",".join(map(str, ids))

        def measured(said: list[int]) -> sides.Measured:
            texts = {PLAIN_ENGINE: plain, PEER: said}
            return sides.measure(
                lambda name: start(texts={key: texts[name]}), arms, cases, [], n_gen=4, rounds=1, together=True
            )

        sides.check(measured(plain), arms, cases, session, tie=0.05)
        second = likely[0].top[1][0]
        wrong = measured([second, *plain[1:]])
        with pytest.raises(WrongAnswerError, match=r"llama\.cpp says .* where plain decoding says"):
            sides.check(wrong, arms, cases, session, tie=0.05)
        margin = likely[0].top[0][1] - likely[0].top[1][1]
        sides.check(wrong, arms, cases, session, tie=margin + 0.1)
        assert wrong.partings[0].margin == pytest.approx(margin, abs=1e-3)
        assert "1 prompts" in summary.partings(wrong, 1)


def test_an_engine_stands_still_when_it_is_not_its_turn(start: Start) -> None:
    engine = start(spin=True)

    def ticks() -> int:
        fields = Path(f"/proc/{engine.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    with engine.turn():
        before = ticks()
        until = time.monotonic() + 10
        while ticks() - before < 3 and time.monotonic() < until:
            time.sleep(0.01)
        assert ticks() - before >= 3, "it spins"
    time.sleep(0.05)
    before = ticks()
    time.sleep(0.2)
    assert ticks() == before
    start_of_end = time.monotonic()
    engine.close()
    assert engine.process.returncode is not None
    assert time.monotonic() - start_of_end < 5


def test_an_engine_that_fails_is_a_sentence(start: Start, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"fake_engine\.py ended: no memory left"):
        start(die=True).generate([1, 2, 3], 4, {})
    with pytest.raises(EngineError, match="a budget is at most 63"):
        start().generate([1, 2, 3], 4, {"budget": 99})
    worker = [sys.executable, str(engines.HERE / "pydflash_worker.py")]
    with pytest.raises(EngineError, match=r"pydflash: .*nothing\.gguf"):
        LinesEngine(worker, Setup(tmp_path / "nothing.gguf", None, 256, 1), tmp_path / "log")
    with pytest.raises(EngineError, match=r"llama\.cpp ended while it was opening"):
        LlamaCpp(SETUP, tmp_path / "log", Path("/bin/false"))


def test_ours_takes_part(tmp_path: Path) -> None:
    engine = engines.pydflash_engine(Setup(models.target_path(), models.draft_path(), 256, 1), tmp_path / "log")
    try:
        with pydflash.Session(n_ctx=256, n_threads=1, kv_type="f16") as session:
            ids = session.tokenize("import os\n")
            plain = session.generate(ids, max_tokens=12, budget=0, temperature=0, ignore_eos=True).ids
        answers = [
            engine.generate(ids, 12, settings)
            for settings in ({"budget": 0}, {"budget": 7, "chain": True}, {"budget": 8})
        ]
        assert [answer.ids for answer in answers] == [plain] * 3
        assert answers[0].n_passes == 12
        assert answers[2].n_passes < 12
        assert all(0 < a.decode_seconds + a.prefill_seconds < a.wall_seconds for a in answers)
        chain = engine.generate(ids, 64, {"budget": 7, "chain": True, "n_passes": 3})
        assert chain.n_passes == 3
        assert chain.n_drafted == 21, "whole passes"
        for accepted in (1, 4):
            told = engine.generate(ids, 64, {"n_passes": 3, "accepted": accepted})
            assert told.n_decoded == 3 * accepted
            assert told.ids == plain[: 3 * accepted]
        assert plain[3] not in engine.generate(ids, 12, {"budget": 8}, [plain[3]]).ids
    finally:
        engine.close()


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
def test_llama_cpp_takes_part(tmp_path: Path) -> None:
    """Both engines say the same with end tokens forbidden, and llama.cpp drafts with the drafter as we convert it."""
    from pydflash.convert import convert

    convert(models.draft_path(), tmp_path / "draft.gguf", target=models.target_path())
    setup = Setup(models.target_path(), tmp_path / "draft.gguf", 256, 1, n_draft=7)
    peer, ours = LlamaCpp(setup, tmp_path / "peer"), engines.pydflash_engine(setup, tmp_path / "ours")
    try:
        with pydflash.Session(n_ctx=256, n_threads=1) as session:
            ids = session.tokenize("def fibonacci(n):\n")
        assert len(peer.forbidden) == 2
        said = peer.generate(ids, 24, {}, peer.forbidden)
        assert said.ids == ours.generate(ids, 24, {"budget": 0}, peer.forbidden).ids
        assert said.n_decoded == 23
        assert 0 < said.n_passes < 23
        assert said.n_drafted > 0
        whole = peer.generate(ids, 256, {"n_passes": 3}, peer.forbidden)
        assert (whole.n_passes, whole.n_drafted) == (3, 21)
        assert whole.ids == peer.generate(ids, len(whole.ids), {}, peer.forbidden).ids
        assert "CPU" in peer.about["system"][0]
    finally:
        peer.close()
        ours.close()


def test_refusals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("scripts/bench_peers.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["bench_peers.py", "--quick"])
    assert script.main() == 1
    assert "pip install '.[bench]'" in capsys.readouterr().err
    for wrong in (
        ["--draft", "d.gguf"],
        ["--rounds", "0"],
        ["--target", "nothing.gguf"],
        ["--llama-server", "/no/such"],
    ):
        monkeypatch.setattr(sys, "argv", ["bench_peers.py", *wrong])
        with pytest.raises(SystemExit) as stop:
            script.main()
        assert stop.value.code == 2
