"""The benchmark: its statistics against numpy, its Markdown, files it changes, datasets, and runs of it."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydflash
from pydflash.bench import figures, prompts, report
from pydflash.bench.figures import Run
from pydflash.errors import ArgumentError, DocumentError, HubError

# ---- statistics ------------------------------------------------------------------------------------------------------


def made(arm: str, prompt: int, number: int, tps: float, **more: Any) -> Run:
    return Run(arm=arm, category="code", prompt=prompt, round=number, n_tokens=60, seconds=60 / tps, **more)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 20])
def test_quartiles_are_numpy_s(n: int) -> None:
    values = np.random.default_rng(n).lognormal(size=n)
    found = figures.spread(values.tolist())
    expected = np.quantile(values, [0.5, 0.25, 0.75])
    np.testing.assert_allclose([found.median, found.low, found.high], expected, rtol=1e-12)


def test_ratios_pair_what_belongs_together() -> None:
    # The second prompt is slow for both, and in round 1 the machine is: neither is seen in a ratio.
    plain = {(0, 0): 100, (0, 1): 50, (1, 0): 10, (1, 1): 5}
    runs = [made("plain", prompt, number, tps) for (prompt, number), tps in plain.items()]
    runs += [made("tree 8", prompt, number, tps * factor) for (prompt, number), tps in plain.items()
             for factor in [1.5 if prompt else 2.5] if (prompt, number) != (1, 1)]  # fmt: skip
    runs.append(made("tree 8", 2, 0, 1e6))  # plain has not answered it
    np.testing.assert_allclose(sorted(figures.ratios(runs, "tree 8", "plain")), [1.5, 2.5, 2.5])
    found = figures.figures(runs)
    assert list(found) == ["plain", "tree 8"]
    assert (found["plain"].ratio, found["tree 8"].n_runs) == (figures.Spread(1, 1, 1), 4)
    ratio = found["tree 8"].ratio
    assert ratio is not None
    np.testing.assert_allclose([ratio.median, ratio.low, ratio.high], [2.5, 2, 2.5])
    # 120 tokens in 0.6 + 6 s, then in 1.2 + 12
    speeds = found["plain"].tokens_per_second
    np.testing.assert_allclose([speeds.median, speeds.low], [(120 / 6.6 + 120 / 13.2) / 2, 120 / 13.2 * 1.25])


def test_acceptance_and_phases_are_pooled_by_step() -> None:
    runs = [
        made("chain", 0, 0, 10, n_steps=10, n_drafted=150, ms={"draft": 20, "verify": 30}, offered=[10, 8],
             reached=[9, 2]),
        made("chain", 1, 0, 10, n_steps=30, n_drafted=450, ms={"draft": 20, "verify": 90}, offered=[2], reached=[0]),
        made("plain", 0, 0, 10),
    ]  # fmt: skip
    found = figures.figures(runs)["chain"]
    assert found.accepted == [9 / 12, 2 / 8]
    assert (found.tokens_per_pass, found.nodes_per_pass) == (120 / 40, 1 + 600 / 40)
    assert (found.step_ms["draft"], found.step_ms["verify"], found.step_ms["commit"]) == (1, 3, 0)
    assert figures.figures(runs)["plain"].tokens_per_pass == 0  # it did not say


def test_auto_is_held_against_the_fastest() -> None:
    speeds = {"plain": 100, "chain": 80, "tree 8": 120, "auto": 117}
    runs = [made(arm, prompt, 0, tps * (prompt + 1)) for arm, tps in speeds.items() for prompt in range(3)]
    best = figures.best_fixed(runs)
    assert best is not None
    assert best[0] == "tree 8"
    assert best[1].median == pytest.approx(117 / 120)
    assert figures.best_fixed([run for run in runs if run.arm != "auto"]) is None


@pytest.mark.parametrize(("ids", "looping"), [
    ([*range(40)], False),
    ([*range(12), *[7, 8, 9] * 12], True),
    ([*range(20), *[7, 8] * 8], False),  # too short to tell
    ([*range(13)] * 4, False),  # too long a period
])  # fmt: skip
def test_loops(ids: list[int], looping: bool) -> None:
    assert figures.loops(ids) == looping


# ---- what is written -------------------------------------------------------------------------------------------------


def test_markdown() -> None:
    table = report.Table(["arm", "of plain"], [["chain", "0.92 (0.90-0.95)"], ["a|b", ""]])
    assert report.markdown(["Two arms.", table]) == (
        "Two arms.\n\n| arm | of plain |\n|-|-:|\n| chain | 0.92 (0.90-0.95) |\n| a\\|b |  |\n"
    )


def test_a_section_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    report.replace_section(path, "bench", "first")
    assert path.read_text() == "<!-- bench begin -->\n\nfirst\n\n<!-- bench end -->\n"
    before, after = "# Results\r\n\n<!-- peers begin -->x<!-- peers end -->\n", "\n\n## More\n\n<!-- a comment -->"
    path.write_text(f"{before}<!-- bench begin -->old <!-- bench end -->{after}", newline="")
    report.replace_section(path, "bench", "new\nlines\n")
    middle = "<!-- bench begin -->\n\nnew\nlines\n\n<!-- bench end -->"
    assert path.read_bytes().decode() == before + middle + after
    report.replace_section(path, "curve", "at the end")
    assert path.read_bytes().decode().endswith(after + "\n\n<!-- curve begin -->\n\nat the end\n\n<!-- curve end -->\n")


@pytest.mark.parametrize("text", [
    "<!-- bench begin -->", "<!-- bench end -->", "<!-- bench end --><!-- bench begin -->",
    "<!-- bench begin --><!-- bench end -->" * 2, "<!-- bench begin --><!-- bench begin --><!-- bench end -->",
])  # fmt: skip
def test_a_file_whose_comments_are_no_pair_stays_as_it_was(text: str, tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    path.write_text(text)
    with pytest.raises(DocumentError, match="once each and in this order"):
        report.replace_section(path, "bench", "new")
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_that_ship(tiny_session: pydflash.Session) -> None:
    for category in prompts.CATEGORIES:
        found = prompts.shipped(tiny_session, category, 3)
        assert [(p.category, p.number) for p in found] == [(category, i) for i in range(3)]
        texts = [tiny_session.detokenize(p.ids) for p in found]
        assert len(set(texts)) == 3
        if category == "quoting":
            begin, again = texts[0].split("\n\n\n")[0], texts[0].split("\n\n\n")[-1]
            assert begin.startswith(again)  # and what the model said stands between
            assert "another" in texts[1].rpartition("\n\n\n")[2]
    assert prompts.document(tiny_session, 200)[:150] == prompts.document(tiny_session, 150)


def test_datasets_from_files_and_from_the_hub(
    tiny_session: pydflash.Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"def f{i}(x):\n", "task_id": i} for i in range(10)]
    file = tmp_path / "HumanEval.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def texts(name: str, count: int) -> list[str]:
        return [tiny_session.detokenize(p.ids) for p in prompts.from_dataset(tiny_session, name, count)]

    spread = [f"def f{i}(x):\n" for i in (0, 3, 6)]
    assert texts(f"humaneval={file}", 3) == spread
    assert len(texts(f"humaneval={file}", 99)) == 10

    asked = []
    hub = types.ModuleType("datasets")

    def load_dataset(path: str, name: str | None, *, split: str) -> Any:
        asked.append((path, name, split))
        if path == "openai/gsm8k":
            raise ConnectionError("nobody there\nat all")
        return rows

    monkeypatch.setattr(hub, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert texts("humaneval", 3) == spread
    with pytest.raises(HubError, match=r"gsm8k cannot be had from the hub \(ConnectionError: nobody there\)"):
        texts("gsm8k", 3)
    assert asked == [("openai/openai_humaneval", None, "test"), ("openai/gsm8k", "main", "test")]
    with pytest.raises(DocumentError, match="is not math500: a row lacks 'problem'"):
        texts("math500", 3)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DocumentError, match="pip install"):
        texts("humaneval", 3)
    for name, sentence in (
        (f"humaneval={tmp_path}/no.jsonl", "cannot read"),
        (f"gsm8k={__file__}", "not lines of JSON"),
    ):
        with pytest.raises(DocumentError, match=sentence):
            texts(name, 3)
    with pytest.raises(ArgumentError, match="humaneval, gsm8k, math500"):
        texts("mmlu", 3)
