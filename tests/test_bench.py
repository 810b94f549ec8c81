"""The benchmark: its statistics against numpy, its Markdown, files it changes, datasets, and runs of it."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import pydflash
from pydflash import cli
from pydflash.bench import answers, figures, floor, measure, plots, prompts, report, summary
from pydflash.bench.figures import Run
from pydflash.bench.floor import Floor
from pydflash.errors import ArgumentError, DocumentError, HubError
from tests.test_sampler import make_params
from tests.tiny_models import TinyDraft, TinyTarget

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


def test_the_report_of_a_made_up_result() -> None:
    speeds = {"auto": 2.0, "tree 8": 1.5, "chain": 0.5, "plain": 1.0}  # arms take turns: any may come first
    measured = measure.Measured(floor=Floor(0.25, 4_000_000, 0.5), prefill_seconds={1024: 0.25},
                                costs={0: pydflash.Costs({1: 1.0, 8: 2.5}, 0.75)})  # fmt: skip
    drafted: dict[str, Any] = {
        "n_steps": 30,
        "n_drafted": 240,
        "expected": 66,
        "offered": [30],
        "reached": [15],
        "ms": {"verify": 60},
    }
    for depth, temperature, slower in ((0, 0.0, 1), (0, 0.7, 2), (1024, 0.0, 4)):
        for arm, factor in speeds.items():
            more = {"n_steps": 60, "ms": {"verify": 60}} if arm == "plain" else drafted
            measured.runs.append(made(arm, 0, 0, 1000 * factor / slower, depth=depth, temperature=temperature, **more))
    measured.partings.append(answers.Parting("chain", "code", 0, 0, 0.7, 5, "'a'", "'b'", 0.0123))
    text = report.markdown(summary.blocks(measured, ["About."]))
    assert text == (Path(__file__).parent / "data" / "bench_report.md").read_text()
    rows = summary.as_rows(measured.runs)
    assert len(rows) == 12
    assert {"arm": "chain", "depth": 1024, "of_plain": 0.5, "accepted_1": 0.5, "verify_ms": 2.0}.items() <= rows[
        -3
    ].items()
    data = json.loads(json.dumps(summary.as_data(measured, {"rounds": 1})))
    assert (len(data["runs"]), data["prefill_seconds"], data["partings"][0]["at"]) == (12, {"1024": 0.25}, 5)
    assert data["costs"] == {"0": {"pass_ms": {"1": 1.0, "8": 2.5}, "draft_ms": 0.75}}


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_margins_are_those_of_the_definition(tiny_session: pydflash.Session) -> None:
    ids = tiny_session.tokenize("def f(x):")
    row = tiny_session.logits(ids)[-1].astype(np.float64)
    best, *_, near = np.argsort(-row)[:5].tolist()
    assert answers.greedy_margin(tiny_session, ids, best, near) == pytest.approx(row[best] - row[near], abs=1e-4)
    assert answers.greedy_margin(tiny_session, ids, best, int(np.argmin(row))) == float("inf")
    # Moving logits by m against one another moves a border at x to x e^-m/T / (x e^-m/T + 1 - x). All borders that
    # reach the draw so name one number, and it lies in the drawn token's stretch.
    temperature = 0.7
    p = np.exp((row - row.max()) / temperature)
    edges = np.concatenate([[0], np.cumsum(p / p.sum())])
    token = pydflash._lib.ffi.new("int32_t *")
    floats = pydflash._lib.ffi.new("float[]", row.tolist())
    params = make_params(temperature=temperature, seed=3)
    assert pydflash._lib.lib.pf_sample(floats, len(row), params, pydflash._lib.ffi.NULL, 0, 0, len(ids), token) == 0
    drawn = int(token[0])
    numbers = []
    for other in [i for i in range(drawn - 20, drawn + 20) if i != drawn and 0 <= i < len(row)]:
        m = answers.drawn_margin(tiny_session, ids, drawn, other, temperature, 3)
        x = edges[other] if other > drawn else edges[other + 1]
        moved = x * np.exp((-m if other > drawn else m) / temperature)
        numbers.append(moved / (moved + 1 - x))
    assert np.ptp(numbers) < 1e-3
    assert edges[drawn] < np.median(numbers) < edges[drawn + 1]


def test_ties_are_of_the_coarsest_type(tiny_target: Path, tmp_path: Path) -> None:
    def tie(target: Path, kv_type: str) -> float:
        with pydflash.Session(target, kv_type=kv_type, n_ctx=256, n_threads=1) as session:
            return answers.largest_tie(session, target)

    assert tie(tiny_target, "f32") == answers.TIES["f32"]
    assert tie(tiny_target, "q8_0") == answers.TIE_OF_CACHES
    assert tie(TinyTarget().write(tmp_path / "q.gguf", types={"ffn_up": "q8_0"}), "f32") == answers.TIES["q8_0"]


def test_the_floor(tiny_session: pydflash.Session, tiny_target: Path) -> None:
    found = floor.measure(tiny_session, tiny_target, 1)
    tensors = {t.name: t.n_bytes for t in gguf.GGUFReader(tiny_target).tensors}
    weights = sum(tensors.values()) - tensors["token_embd.weight"]
    assert weights < found.n_bytes < 1.5 * weights  # and the state, and logits
    assert 0 < found.read_ms < 1
    assert found.step_ms(1) == max(found.token_ms, found.read_ms)
    assert found.step_ms(1e6) == 1e6 * found.token_ms
    assert Floor(0.5, 10**6, 0).step_ms(1) == 0.5


# ---- the command -----------------------------------------------------------------------------------------------------


ARMS = ["plain", "chain", "tree 3", "tree 8", "auto"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A pair whose texts are bytes and whose context has room for a document of them."""
    folder = tmp_path_factory.mktemp("pair")
    target = TinyTarget(n_ctx=4096)
    files = target.write(folder / "target.gguf", tokenizer=True), TinyDraft.of(target).write(folder / "draft.gguf")
    return ["bench", "--target", str(files[0]), "--draft", str(files[1]), "--kv-type", "f32", "--n-threads", "1"]


SHORT = [
    "--prompts",
    "1",
    "--n-gen",
    "6",
    "--rounds",
    "2",
    "--budgets",
    "3",
    "8",
    "--depths",
    "0",
    "256",
    "--n-ctx",
    "2048",
]


def test_a_whole_run(pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"out.{name}" for name in ("json", "csv", "markdown")}
    outputs = [x for name, path in files.items() for x in (f"--{name}", str(path))]
    assert cli.main([*pair, *SHORT, "--categories", "code", "quoting", *outputs]) == 0
    found = json.loads(files["json"].read_text())
    runs = [Run(**run) for run in found["runs"]]
    # Two categories greedily, the first sampled and behind a document; two rounds.
    assert len(runs) == 2 * 4 * len(ARMS)
    for question, group in figures.grouped(runs, lambda run: run.question).items():
        assert {run.arm for run in group} == set(ARMS), question
        assert len({run.output_hash for run in group}) == 1
        for run in group:
            assert (run.n_tokens, run.seconds > 0) == (6, True)
            assert run.n_steps == 6 if run.arm == "plain" else 1 <= run.n_steps <= 6
            assert all(reached <= offered for reached, offered in zip(run.reached, run.offered, strict=True))
    assert list(found["prefill_seconds"]) == ["256"]
    assert found["partings"] == []
    printed = capsys.readouterr().out
    assert f"All {4 * (len(ARMS) - 1)} texts are those of plain decoding" in printed
    written = files["markdown"].read_text()
    assert written.startswith("<!-- bench begin -->")
    assert written.count("\n|-|-:") == 8
    assert files["csv"].read_text().count("\n") == 1 + 4 * len(ARMS)


def test_without_a_drafter_there_is_one_way(pair: list[str], tmp_path: Path) -> None:
    assert cli.main([*pair[:3], *pair[5:], *SHORT, "--categories", "code", "--json", str(tmp_path / "out")]) == 0
    assert {run["arm"] for run in json.loads((tmp_path / "out").read_text())["runs"]} == {"plain"}


def patched(monkeypatch: pytest.MonkeyPatch, after: int, then: Any) -> None:
    """From the so manieth run with a chain on, `then` changes results."""
    generate = pydflash.Session.generate
    count = iter(range(10**6))

    def changed(self: pydflash.Session, *args: Any, **settings: Any) -> Any:
        result = generate(self, *args, **settings)
        return then(result) if settings.get("chain") and next(count) >= after else result

    monkeypatch.setattr(pydflash.Session, "generate", changed)


def test_an_arm_that_lies_is_refused(
    pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lie(result: pydflash.Result) -> pydflash.Result:
        return replace(result, ids=[*result.ids[:3], (result.ids[3] + 1) % 256, *result.ids[4:]])

    patched(monkeypatch, 4, lie)
    out = tmp_path / "RESULTS.md"
    assert cli.main([*pair, *SHORT, "--categories", "prose", "--markdown", str(out)]) == 1
    said = capsys.readouterr().err
    assert "error: chain says " in said
    assert "where plain decoding says " in said
    assert "prose prompt 0" in said
    assert "output token 3" in said
    assert "which is no tie (up to 0.002 is" in said
    assert not out.exists()


def test_what_was_measured_before_ctrl_c_is_written(
    pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_result: pydflash.Result) -> pydflash.Result:
        raise KeyboardInterrupt

    for after in (0, 3):  # while warming up; when some runs have been made
        with monkeypatch.context() as patch:
            patched(patch, after, interrupt)
            path = tmp_path / f"{after}.json"
            assert cli.main([*pair, *SHORT, "--categories", "code", "chat", "--json", str(path)]) == 130
        runs = json.loads(path.read_text())["runs"]
        assert 0 < len(runs) < 32 if after else runs == []
        assert ("Interrupted: " in (out := capsys.readouterr().out), "Nothing was" in out) == (True, not after)


def test_plots_need_matplotlib_before_the_work(
    pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DocumentError, match=r"pip install 'pydflash\[bench\]'"):
        plots.load()


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    measured = measure.Measured(floor=Floor(0.1, 10**6, 0.2), costs={0: pydflash.Costs({1: 0.5, 8: 2.0}, 0.3)})
    for depth in (0, 1024):
        for i, arm in enumerate(ARMS):
            measured.runs.append(made(arm, 0, 0, 100 + i, depth=depth, n_steps=10, n_drafted=30, ms={"verify": 5.0}))
    drawn = plots.draw(measured, tmp_path / "plots")
    assert [path.name for path in drawn] == [f"bench-{name}.svg" for name in ("depth", "budget", "phases", "curve")]
    text = drawn[0].read_text()
    assert all(f">{arm}<" in text for arm in ARMS)
    assert ">1,024<" in text
    before = [path.read_bytes() for path in drawn]
    assert [path.read_bytes() for path in plots.draw(measured, tmp_path / "plots")] == before
    assert plots.draw(measure.Measured(), tmp_path / "none") == []
