"""Predicted speeds: bytes against counts made with the gguf package and with the memory plan, and what they promise."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pydflash
from pydflash import models
from pydflash.bench.figures import Run
from pydflash.cards import CARDS, bandwidth_of, find_card
from pydflash.plan import plan
from pydflash.speed import SHIPPED, WAYS, Pair, predict, read_acceptance, read_pair, step_bytes, step_ops
from tests.scripts import load_script
from tests.tiny_models import TinyDraft, TinyTarget


def counted(path: Path, names: str = ".*", *, but: str = "") -> int:
    """Bytes of the tensors with such names, from their shapes and the gguf package's own block sizes."""
    total = 0
    for tensor in gguf.GGUFReader(path).tensors:
        if re.fullmatch(names, tensor.name) and not re.fullmatch(but, tensor.name):
            block, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
            total += int(tensor.n_elements) // block * size
    return total


@pytest.fixture(scope="module")
def shape_27b(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Qwen3.5-27B and its drafter, headers over holes."""
    folder = tmp_path_factory.mktemp("27b")
    assert load_script("scripts/make_shape.py").main(["--shape", "27b", "--out", str(folder), "--sparse"]) == 0
    return folder / "target.gguf", folder / "draft.gguf"


@pytest.mark.parametrize("types", ["f32", "q8_0", "q4_0", {"ffn": "q4_1", "attn": "q5_0", "output": "bf16"}])
@pytest.mark.parametrize("form", [{}, {"tied": True}, {"mtp": True}, {"scales": True}], ids=str)
def test_weights_are_the_tensors(tmp_path: Path, types: str | dict[str, str], form: dict[str, bool]) -> None:
    t = TinyTarget(**form)
    target = t.write(tmp_path / "target.gguf", types=types)
    draft = TinyDraft.of(t).write(tmp_path / "draft.gguf", types=types)
    b = step_bytes(read_pair(target, draft), n_nodes=9, depth=100, kv_type="f16")
    mtp = rf"blk\.{t.n_layer}\..*"
    assert b.target == counted(target, but=rf"token_embd\.weight|output\.weight|{mtp}")
    assert b.lm_head == 2 * counted(target, "token_embd.weight" if t.tied else "output.weight")
    d = TinyDraft.of(t)
    kept = 2 * d.n_layer * d.n_head_kv * d.head_dim * 2 * (100 + d.block_size)  # K and V, f16
    assert b.drafter == counted(draft) + counted(draft, r".*\.attn_[kv]\.weight") + kept


def test_the_shipped_pair() -> None:
    target = models.target_path()
    pair = read_pair(target, models.draft_path())
    b = step_bytes(pair, n_nodes=1, depth=1000, kv_type="q8_0")
    assert b.target + b.lm_head == counted(target, but="token_embd.weight")
    assert b.drafter == 0
    assert pair.block == 16
    safetensors = (models.draft_path() / "model.safetensors").stat().st_size
    assert pair.drafter.n_bytes == pytest.approx(safetensors, rel=0.01)


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0", "q4_0"])
def test_state_and_caches_are_the_plans(tiny_target: Path, tiny_draft: Path, kv_type: str) -> None:
    """What the core allocates for so many rows and nodes, each of them padded."""
    planned = {row.name: row.n_bytes for row in plan(tiny_target, tiny_draft, n_ctx=448, kv_type=kv_type, budget=9,
               device="cpu").rows}  # fmt: skip
    pair = read_pair(tiny_target, tiny_draft)
    hadamard = 4 * (32 * 32 + 32 * 32) if kv_type == "q4_0" else 0
    assert pair.kv_bytes(kv_type) * 512 + hadamard == planned["KV cache"]
    assert pair.state == planned["recurrent and convolution state"]
    assert pair.scratch * 10 == pytest.approx(planned["tree scratch"], rel=0.02)


def test_the_27b_at_128k(shape_27b: tuple[Path, Path]) -> None:
    """The floor on a 3090: 16 GB of target weights, 17 ms; the drafter, 3.7 ms; head and KV cache: about 24 ms."""
    b = step_bytes(read_pair(*shape_27b), n_nodes=23, depth=131072, kv_type="q4_0")
    ms = {part: n_bytes / 936e6 for part, n_bytes in b._asdict().items()}
    head = ms["lm_head"] / 2
    assert ms["target"] + head == pytest.approx(17, abs=0.2)
    assert ms["drafter"] == pytest.approx(3.7, abs=0.25)
    assert ms["target"] + ms["lm_head"] + ms["drafter"] + ms["kv"] == pytest.approx(24, abs=0.6)
    assert b.kv_copy == pytest.approx(2 * 131072 * 64 * 1024, rel=1e-3)  # 64 KiB a token in f16, written and read
    assert b.floor == sum(b) - b.kv_copy
    assert step_ops(read_pair(*shape_27b), n_nodes=1, depth=0)["target"][0] == pytest.approx(2 * 24.35e9, rel=1e-3)


def test_who_copies_the_cache(shape_27b: tuple[Path, Path]) -> None:
    pair = read_pair(*shape_27b)

    def copied(kv_type: str | tuple[str, str], n_nodes: int, device: str = "cuda") -> int:
        return step_bytes(pair, n_nodes=n_nodes, depth=1000, kv_type=kv_type, device=device).kv_copy

    assert copied("f16", 23) == copied("q4_0", 1) == copied("q8_0", 23, "cpu") == 0
    assert copied("q4_0", 23) == copied("q8_0", 23) == 2 * copied(("f16", "q4_0"), 23) > 0
    assert copied("f32", 1) > 0
    with pytest.raises(pydflash.ArgumentError, match="kv_type is auto"):
        step_bytes(pair, n_nodes=1, depth=0, kv_type="auto")


@pytest.fixture(scope="module")
def shipped() -> Pair:
    return read_pair(models.target_path(), models.draft_path())


@given(
    nodes=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    depths=st.tuples(st.integers(0, 262144), st.integers(0, 262144)),
    kv_type=st.sampled_from(["f32", "f16", "q8_0", "q4_0", ("q8_0", "q4_0")]),
)
def test_more_moves_more(
    shipped: Pair, nodes: tuple[int, int], depths: tuple[int, int], kv_type: str | tuple[str, str]
) -> None:
    less = step_bytes(shipped, n_nodes=min(nodes), depth=min(depths), kv_type=kv_type)
    more = step_bytes(shipped, n_nodes=max(nodes), depth=max(depths), kv_type=kv_type)
    assert all(a <= b for a, b in zip(less, more, strict=True))
    assert min(less) >= 0
    fewer, greater = (step_ops(shipped, n_nodes=f(nodes), depth=f(depths)) for f in (min, max))
    assert all(fewer[part] <= greater[part] for part in fewer)


@given(budget=st.integers(1, 63))
def test_accepted_lies_between_the_known(budget: int) -> None:
    low = max((b for b in SHIPPED.tree if b <= budget), default=0)
    high = min(b for b in SHIPPED.tree if b >= budget)
    assert SHIPPED.tree.get(low, 1.0) <= SHIPPED.at(budget) <= SHIPPED.tree[high]
    assert SHIPPED.at(0) == 1
    assert read_acceptance("6.5").at(budget) == read_acceptance("6.5").at(15, True) == 6.5


def test_accepted_by_the_benchmark(tmp_path: Path) -> None:
    """As it writes its runs: all greedy ones of an arm together."""
    rows = [("tree 8", 40, 10, 0.0), ("tree 8", 20, 10, 0.0), ("tree 32", 50, 10, 0.0), ("chain", 25, 10, 0.0),
            ("tree 8", 900, 1, 0.7), ("plain", 9, 9, 0.0)]  # fmt: skip
    runs = [Run(arm, "code", 0, 0, n, 1.0, n_steps=steps, temperature=t) for arm, n, steps, t in rows]
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"runs": [asdict(run) for run in runs]}))
    found = read_acceptance(str(file))
    assert (found.at(0), found.at(8), found.at(32), found.at(63), found.at(15, True)) == (1, 3, 5, 5, 2.5)
    assert 3 < found.at(16) < 5
    file.write_text(json.dumps({"runs": []}))
    with pytest.raises(pydflash.ArgumentError, match="no tree was measured"):
        read_acceptance(str(file))


def test_the_shipped_curve_is_what_the_pair_does() -> None:
    """On a few of the held-out prompts; the curve is of 120."""
    prompts = json.loads((Path(__file__).parent / "data" / "heldout_prompts.json").read_text())["prompts"][::10]
    with pydflash.Session(n_ctx=1024, n_threads=1) as session:
        for budget in (16, 63):
            stats = [session.generate(p["text"], max_tokens=40, budget=budget, ignore_eos=True).stats for p in prompts]
            per_pass = sum(s.n_generated for s in stats) / sum(s.n_steps for s in stats)
            assert per_pass == pytest.approx(SHIPPED.at(budget), rel=0.25)


def test_a_step_takes_what_its_parts_take(shape_27b: tuple[Path, Path]) -> None:
    pair = read_pair(*shape_27b)
    made = plan(*shape_27b, n_ctx=131072, kv_type="q4_0", budget=63, vram=CARDS["RTX 3090"].n_bytes)
    assert made.fits
    slow, fast = predict(pair, made, card="RTX 3090"), predict(pair, made, card="RTX 3090", bandwidth=2 * 936)
    assert [(s.depth, s.budget) for s in slow.steps] == [(d << 10, b) for d in (1, 8, 32, 128) for b, _ in WAYS]
    for a, b in zip(slow.steps, fast.steps, strict=True):
        assert sum(a.ms.values()) == pytest.approx(2 * sum(b.ms.values()))
        assert a.arithmetic_ms <= b.arithmetic_ms  # what there is more of when memory is faster
        assert b.step_ms < a.step_ms
        assert a.tokens_per_second == pytest.approx(1e3 * a.accepted / a.step_ms)
    bound = {s.budget: s.arithmetic_ms for s in slow.steps if s.depth == 1024}
    assert bound[0] == bound[22] == 0 < bound[63]
    assert all(found.tokens_per_second < step.tokens_per_second for found, step in slow.published)  # a floor of time
    assert not predict(pair, made, bandwidth=936).published


# ---- the command -------------------------------------------------------------------------------------------------


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "pydflash", "plan", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_every_line_says_that_it_is_a_prediction(shape_27b: tuple[Path, Path]) -> None:
    files = ("--target", shape_27b[0], "--draft", shape_27b[1])
    done = command(*files, "--speed", "--gpu", "rtx3090", "--accepted", "8.31", "--kv-type", "q4_0")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 4 * len(WAYS)
    assert all(line.startswith("predicted ") for line in lines)
    assert sum("published" in line for line in lines) >= 3
    found = json.loads(command(*files, "--speed", "--gpu", "3090", "--budget", 22, "--json").stdout)
    assert found["predicted"] is True
    assert {step["budget"] for step in found["steps"]} == {0, 22}
    assert all(step["predicted"] is True and sum(step["ms"].values()) == pytest.approx(step["step_ms"], abs=1e-3)
               for step in found["steps"])  # fmt: skip


def test_what_does_not_fit_is_the_plans_refusal(shape_27b: tuple[Path, Path]) -> None:
    done = command("--target", shape_27b[0], "--draft", shape_27b[1], "--speed", "--gpu", "4080")
    assert done.returncode == 1
    assert "error: it does not fit into 16,048.0 MiB" in done.stderr
    assert "tokens/s" not in done.stdout


def test_without_a_drafter_there_is_plain_decoding(tiny_target: Path) -> None:
    done = command("--target", tiny_target, "--speed", "--bandwidth", 500, "--vram", "8GiB", "--json")
    found = json.loads(done.stdout)
    assert [(step["depth"], step["budget"]) for step in found["steps"]] == [(512, 0)]  # as far as this model goes
    assert found["tflops"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--speed",), "--speed goes with --gpu"),
        (("--speed", "--bandwidth", 500), "or with --bandwidth and --vram"),
        (("--accepted", "6"), "go with --speed"),
        (("--gpu", "3099"), "did you mean '3090'"),
        (("--gpu", "h100"), "H100 PCIe or H100 80GB HBM3"),
        (("--speed", "--gpu", "3090", "--accepted", "0"), "accepted is 0"),
        (("--speed", "--gpu", "3090", "--accepted", "nothing.json"), "no number and no file"),
        (("--speed", "--gpu", "3090", "--accepted", __file__), "has not written"),
        (("--speed", "--gpu", "3090", "--bandwidth", 0), "bandwidth"),
    ],
)
def test_what_is_refused(tiny_target: Path, arguments: tuple[object, ...], words: str) -> None:
    done = command("--target", tiny_target, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", CARDS)
def test_cards_by_their_names(name: str) -> None:
    assert find_card(name) == find_card(f"NVIDIA GeForce {name.lower()}") == name
    assert bandwidth_of(f"NVIDIA {name}") == CARDS[name].bandwidth
