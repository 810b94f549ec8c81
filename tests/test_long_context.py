"""scripts/long_context.py with --quick, on random models of a context so short that the script must change it."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import TinyDraft, TinyTarget

SCRIPT = Path(__file__).parent.parent / "scripts" / "long_context.py"
DEPTHS = {"300", "1200"}  # of --quick


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a run of all parts wrote."""
    folder = tmp_path_factory.mktemp("long")
    target = TinyTarget(n_ctx=64)
    pair = target.write(folder / "target.gguf", tokenizer=True), TinyDraft.of(target).write(folder / "draft.gguf")
    command = [sys.executable, str(SCRIPT), "all", "--quick", "--target", str(pair[0]), "--draft", str(pair[1])]
    command += ["--n-ctx", "2048", "--n-threads", "1", "--out", str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr  # the progress of a prefill
    return folder / "out"


def rows(results: Path, part: str) -> list[dict[str, str]]:
    with (results / f"long_{part}.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    markdown = (results / f"long_{part}.md").read_text()
    assert f"python scripts/long_context.py {part} --quick" in markdown
    assert markdown.count("\n|") >= len({row.get("depth") for row in found})
    return found


def test_tree_is_plain_and_memory_is_flat(results: Path) -> None:
    found = rows(results, "equal")
    exact = [row for row in found if row["kv_type"] == "f32"]
    assert {row["depth"] for row in exact} == DEPTHS
    for row in exact:
        assert row["same"] == row["tokens"] == "16"
        assert row["margin"] == ""
    for row in found:
        assert float(row["growth_mib"]) < 48  # graphs of new shapes; a leak per token would be more
        assert (row["margin"] == "") == (row["same"] == row["tokens"])


def test_time_against_depth(results: Path) -> None:
    found = rows(results, "speed")
    for kv_type in ("f16", "q4_0"):
        assert [int(row["depth"]) for row in found if row["kv_type"] == kv_type] == [300, 600, 900]
    assert all(float(row[key]) > 0 for row in found for key in ("prefill_tps", "plain_ms_per_token", "tree_verify_ms"))


def test_rounder_caches_have_larger_errors(results: Path) -> None:
    found = {row["kv_type"]: row for row in rows(results, "kv")}
    assert float(found["f32"]["nmse_f32"]) == float(found["f16"]["nmse_f16"]) == 0
    errors = [float(found[kv_type]["nmse_f32"]) for kv_type in ("f32", "f16", "q8_0", "q4_0")]
    assert errors == sorted(set(errors))
    assert float(found["f16"]["of_f16"]) == 1


def test_the_ring_against_the_reference(results: Path) -> None:
    found = rows(results, "ring")
    exact = [row for row in found if row["what"] == "logits"]
    assert [int(row["depth"]) for row in exact] == [255, 257, 700]
    for row in exact:
        assert float(row["error"]) < 1e-4
        if int(row["depth"]) > int(row["n_ring"]):
            assert float(row["error_of_one_more"]) > 3 * float(row["error"])
            assert float(row["error_of_all"]) >= float(row["error_of_one_more"])
    (cost,) = (row for row in found if row["what"] == "tokens per pass")
    assert float(cost["per_pass"]) >= 1
    assert cost["same_text"] == cost["prompts"]  # the ring changes speed, never the text
