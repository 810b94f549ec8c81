"""scripts/gpu_report.py, on the CPU with the pair that ships: it must be right before anybody runs it on a card."""

from __future__ import annotations

import csv
import re
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import gguf
import pytest

import pydflash
from pydflash import models
from pydflash.cards import bandwidth_of
from tests.scripts import load_script
from tests.tiny_models import TinyDraft

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_report.py"
PARTS = {"device", "tests", "ops", "sizes", "prompts", "depths", "memory"}


class Run:
    """One run: its exit code, its section, its rows by part. SIGINT is sent once stderr has an `interrupt_at` in it."""

    def __init__(self, folder: Path, *arguments: object, quick: bool = True, interrupt_at: str | None = None) -> None:
        command = [sys.executable, str(SCRIPT), *["--quick"] * quick, "--n-threads", "1", "--out", str(folder)]
        with subprocess.Popen(
            [*command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=interruptible
        ) as process:
            assert process.stderr is not None
            said = b""
            while block := process.stderr.read1(4096):  # type: ignore[attr-defined]  # a pipe is a BufferedReader
                said += block
                if interrupt_at and re.search(interrupt_at.encode(), said):
                    process.send_signal(signal.SIGINT)
                    interrupt_at = None
            printed = process.communicate()[0].decode()
        self.code, self.said = process.returncode, said.decode()
        self.section = (folder / "gpu_report.md").read_text()
        assert printed.strip() == self.section.strip()
        self.rows: dict[str, list[dict[str, str]]] = defaultdict(list)
        with (folder / "gpu_report.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                self.rows[row["part"]].append(row)


def interruptible() -> None:
    """A shell's background jobs, and what they start, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_the_whole_report(tmp_path: Path) -> None:
    run = Run(tmp_path, "--device", "cpu", "--bandwidth", 20)
    assert run.code == 0, run.said
    assert set(run.rows) == PARTS
    assert "What did not work" not in run.section
    for text in ("SHA-256", "20 GB/s", "tiny-target-f16.gguf", pydflash.__version__, "llama-cpp-python=="):
        assert text in run.section
    (tests,) = run.rows["tests"]
    assert int(tests["passed"]) >= 5
    assert int(tests["failed"]) == 0
    assert all(float(row["error"]) < 3e-6 for row in run.rows["ops"])
    assert {row["category"] for row in run.rows["prompts"]} == {"code", "maths", "prose", "chat"}
    assert all(int(row["n_generated"]) == 12 for row in run.rows["prompts"])
    memory = {row["what"]: float(row["mib"]) for row in run.rows["memory"]}
    assert 0 < memory["planned: KV cache"] < memory["planned, total"]
    assert {row["depth"] for row in run.rows["depths"]} == {"64", "160"}
    for row in run.rows["depths"]:
        assert float(row["verify_ms"]) > 0
        assert float(row["first_ms"]) > float(row["step_ms"]) / 2
    shown = [line.split("|")[-3].strip() for line in run.section.splitlines() if line.startswith("| 64 | chain |")]
    tensors = {tensor.name: tensor.n_bytes for tensor in gguf.GGUFReader(models.target_path()).tensors}
    draft = (models.draft_path() / "model.safetensors").stat().st_size
    # All of both models but the embedding, and the head once more for the drafter; then state, cache and logits.
    weights = sum(tensors.values()) - tensors["token_embd.weight"] + tensors["output.weight"] + draft
    assert 1 < float(shown[-1]) / (weights / 20e6) < 1.2


def test_a_part_that_fails_is_a_sentence(tmp_path: Path, tiny_target: Path) -> None:
    """A drafter for another target: nothing with a session can run, all else does."""
    draft = TinyDraft(n_embd=128).write(tmp_path / "wide.gguf")
    run = Run(tmp_path / "out", "--device", "cpu", "--target", tiny_target, "--draft", draft)
    assert run.code == 1
    for part in ("prompts", "depths", "memory"):
        assert not run.rows[part]
        assert f"- The part '{part}' failed: DraftMismatchError: " in run.section
    assert run.rows["ops"]
    assert run.rows["sizes"]
    assert "tests passed, 0 failed" in run.section


def test_interrupted_it_reports_what_was_measured(tmp_path: Path) -> None:
    """In the prefill behind the first depth: the rows of that depth stand, parts that would follow are not begun."""
    run = Run(tmp_path, "--device", "cpu", "--n-ctx", 17_000, "--only", "depths", "memory", quick=False,
              interrupt_at=r"depths: [2-9],\d+ of 16,384")  # fmt: skip
    assert run.code == 130, run.said
    assert "Interrupted in the part 'depths'" in run.section
    assert [(row["depth"], row["way"]) for row in run.rows["depths"]] == [
        ("1024", "plain"), ("1024", "chain"), ("1024", "tree of 22")
    ]  # fmt: skip
    assert run.section.count("| 1,024 |") == 6  # speed and breakdown
    assert "memory" not in run.rows
    assert "Traceback" not in run.said


def test_a_prompt_that_was_cut_short_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    script = load_script("scripts/gpu_report.py")
    row = {"category": "code", "n_generated": 8, "n_steps": 4, "decode_tps": 3.0, "first_ms": 1.0, "parted_at": None}
    rows = [{"prompt": prompt, "way": way, **row} for prompt in (0, 1) for way in ("plain", "chain")]
    shown = script.show_prompts(None, rows[:-1])
    assert "1 prompts, greedy" in shown
    assert "0 of 1 drafted texts" in shown


def why_no_card() -> str:
    """Why this machine has no CUDA device to run on; skips the test where it has."""
    try:
        pydflash.device_info("cuda")
    except pydflash.PydflashError as error:
        return str(error)
    pytest.skip("this machine has a card")


def test_a_card_that_is_not_there(tmp_path: Path) -> None:
    reason = why_no_card()
    run = Run(tmp_path, "--device", "cuda", "--only", "sizes")
    assert run.code == 1
    assert reason.rstrip(".") in run.section
    assert run.rows["sizes"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA GeForce RTX 3090", 936),
        ("NVIDIA GeForce RTX 3090 Ti", 1008),
        ("NVIDIA L40S", 864),
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("NVIDIA GeForce RTX 30905", None),
        ("AMD EPYC", None),
    ],
)
def test_bandwidth_of_a_name(name: str, expected: float | None) -> None:
    assert bandwidth_of(name) == expected
