"""The memory plan against what sessions allocate, against sizes worked out from the definition, and what it chooses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest

import pydflash
from pydflash.plan import Plan, n_bytes, plan
from tests.tiny_models import TinyDraft, TinyTarget

MIB = 1 << 20
OURS = (
    "KV cache",
    "recurrent and convolution state",
    "tree scratch",
    "feature ring",
    "drafter K/V ring",
    "compute buffer",
)
GRAPHS = "kept graphs, on the host"


def ours(p: Plan) -> dict[str, int]:
    """The rows of a session's own buffers, in bytes."""
    return {row.name: row.n_bytes for row in p.rows if row.name in OURS}


def buffers(session: pydflash.Session) -> dict[str, int]:
    """The same of what a session has; graphs come with use."""
    return {name: n for name, n in session.memory.items() if name != GRAPHS}


# ---- the plan is what is allocated -------------------------------------------------------------------------------


@pytest.mark.parametrize("drafted", [True, False], ids=["drafter", "no drafter"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_type": "f32", "n_ctx": 512, "budget": 63},
        {"kv_type": "f16", "n_ctx": 100, "n_batch": 64, "budget": 0},
        {"kv_type": "q8_0", "n_ctx": 300, "n_batch": 128, "budget": 1},
        {"kv_type": "q4_0", "n_ctx": 512, "n_batch": 256, "n_ring": 256, "budget": 22},
        {"kv_type": ("q8_0", "q4_0"), "n_ctx": 1, "budget": 7},
    ],
    ids=lambda options: ", ".join(f"{name} {value}" for name, value in options.items()) or "defaults",
)
def test_planned_is_allocated(tiny_target: Path, tiny_draft: Path, drafted: bool, options: dict[str, Any]) -> None:
    draft = tiny_draft if drafted else None
    planned = plan(tiny_target, draft, device="cpu", **options)
    with pydflash.Session(tiny_target, draft, device="cpu", n_threads=1, **options) as session:
        assert session.plan.rows == planned.rows
        assert buffers(session) == ours(planned)
        room = session.n_ctx // 2
        if room > 4:  # prefill in several chunks, then every way of decoding that the session has made room for
            for budget in {0, planned.budget if drafted else 0}:
                for chain in (False, True):
                    session.generate(range(32, 32 + room), max_tokens=8, budget=budget, chain=chain, temperature=0.5)
        assert buffers(session) == ours(planned), "running took more than was planned"


def test_every_layer_kind(tmp_path: Path) -> None:
    """Models without attention, and without recurrence, have no memory of that kind."""
    for recurrent, row in (((True,) * 4, "KV cache"), ((False,) * 4, "recurrent and convolution state")):
        target = TinyTarget(recurrent=recurrent).write(tmp_path / "target.gguf")
        planned = plan(target, device="cpu")
        assert ours(planned)[row] == 0
        with pydflash.Session(target, n_threads=1) as session:
            session.generate(range(20), max_tokens=4)
            assert buffers(session) == ours(planned)


def test_a_larger_budget_than_planned_takes_more(tiny_target: Path, tiny_draft: Path) -> None:
    with pydflash.Session(tiny_target, tiny_draft, budget=4, n_threads=1) as session:
        before = session.memory
        session.generate(range(20), max_tokens=4, budget=40)
        assert session.memory["tree scratch"] > before["tree scratch"]


def test_kept_graphs_stay_below_what_is_planned(tiny_target: Path, tiny_draft: Path) -> None:
    """Each has a context of whole pages that it fills, and the oldest go: more than are kept are built here."""
    with pydflash.Session(tiny_target, tiny_draft, n_ctx=256, n_threads=1, device="cpu") as session:
        assert session.memory[GRAPHS] == 0
        for budget in range(1, 64):
            session.reset()
            session.generate(range(20), max_tokens=budget + 2, budget=budget, ignore_eos=True)
        assert session.counters.graphs_built > 64
        planned = {row.name: row.n_bytes for row in session.plan.rows}[GRAPHS]
        assert planned / 8 < session.memory[GRAPHS] <= planned
        assert session.memory[GRAPHS] % 4096 == 0


# ---- sizes from the definition -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kv_type", "row"), [("f32", 64 * 4), ("f16", 64 * 2), ("q8_0", 2 * 34), ("q4_0", 2 * 18)])
def test_caches_by_hand(tiny_target: Path, tiny_draft: Path, kv_type: str, row: int) -> None:
    t, d = TinyTarget(), TinyDraft.of(TinyTarget())
    planned = ours(
        plan(tiny_target, tiny_draft, kv_type=kv_type, n_ctx=300, budget=9, n_batch=128, n_ring=500, device="cpu")
    )
    rows = 512  # 300 and 64 for a tree, in steps of 256
    hadamard = 4 * (32 * 32 + 32 * 32) if kv_type == "q4_0" else 0
    assert planned["KV cache"] == 2 * rows * row + hadamard  # one attention layer of two heads of 32
    channels = (2 * t.k_heads + t.v_heads) * t.state
    assert planned["recurrent and convolution state"] == 3 * 4 * (t.v_heads * t.state**2 + channels * (t.conv - 1))
    node = t.k_heads * t.state + t.v_heads * t.state + t.v_heads + channels  # keys, deltas, decays, columns
    assert planned["tree scratch"] == pytest.approx(3 * 10 * 4 * node, abs=3 * 4 * 32)  # aligned to 32 bytes
    wide = 4 if kv_type == "f32" else 2
    assert planned["feature ring"] == 128 * len(d.target_ids) * t.n_embd * wide  # one chunk
    slots = 512  # a block of 8, the ring and one for pads, in steps of 256
    assert planned["drafter K/V ring"] == d.n_layer * 2 * slots * d.n_head_kv * d.head_dim * wide + 4 * t.n_embd


def test_weights_are_the_files(tiny_target: Path, tiny_draft: Path) -> None:
    """On the CPU every weight counts, where it lies in the file; a CUDA card has all but the embedding."""
    tensors = [t for path in (tiny_target, tiny_draft) for t in gguf.GGUFReader(path).tensors]
    total = sum(int(t.n_bytes) for t in tensors)
    embedding = sum(int(t.n_bytes) for t in tensors if t.name == "token_embd.weight")
    on_cpu, on_cuda = (plan(tiny_target, tiny_draft, device=d, vram="1GiB") for d in ("cpu", "cuda"))
    weights = ("target weights", "drafter weights", "token embedding, on the host")
    assert sum(on_cpu.mib[name] for name in weights) * MIB == pytest.approx(total, rel=0.01)
    assert on_cpu.mib[weights[2]] * MIB == embedding
    kinds = {row.name: row.kind for row in on_cuda.rows}
    assert kinds[weights[2]] == "aside"
    assert on_cuda.total == pytest.approx(sum(row.mib for row in on_cuda.rows if row.kind != "aside"))


def test_a_tied_embedding_goes_to_the_card(tmp_path: Path) -> None:
    target = TinyTarget(tied=True).write(tmp_path / "tied.gguf")
    total = sum(int(t.n_bytes) for t in gguf.GGUFReader(target).tensors)
    planned = plan(target, vram="1GiB")
    assert planned.mib["target weights"] * MIB == pytest.approx(total, rel=0.02)


def test_what_cuda_adds(tmp_path: Path) -> None:
    """Rows of quantised weights are padded to 512 values; K and V are copied to f16 unless they are that already."""
    target = TinyTarget(n_ctx=4096, interval=2)
    exact = TinyTarget().write(tmp_path / "f32.gguf")
    planned = {
        kv: plan(target.write(tmp_path / "t.gguf"), kv_type=kv, n_ctx=4000, n_batch=64, vram="1GiB")
        for kv in ("f16", "q8_0", "f32")
    }
    copy = "flash attention's f16 copy of K and V"
    assert planned["f16"].mib[copy] == 0
    both = 2 * 4096 * 64 * 2  # K and V, 4,096 rows of two heads of 32
    for kv in ("q8_0", "f32"):
        # It lies where other tensors of its time would, so it adds to the buffer at most its own size.
        assert 0.5 * both <= planned[kv].mib[copy] * MIB <= both + 256
    quantised = TinyTarget().write(tmp_path / "q8_0.gguf", types="q8_0")
    tensors = [t for t in gguf.GGUFReader(quantised).tensors if t.name != "token_embd.weight"]
    padding = sum(34 * (512 - int(t.shape[0]) % 512) // 32 for t in tensors if t.tensor_type.name == "Q8_0")
    stored = sum(-(-int(t.n_bytes) // 128) * 128 for t in tensors)
    extra = plan(quantised, vram="1GiB").mib["target weights"] * MIB - stored
    assert padding <= extra < padding + 128 * len(tensors)
    assert plan(exact, vram="1GiB").mib["target weights"] * MIB < sum(
        int(t.n_bytes) + 128 for t in gguf.GGUFReader(exact).tensors
    )


# ---- choosing ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained, it says, for a million tokens. Attention in layers 1 and 3: prefill needs the first for its features."""
    return TinyTarget(n_ctx=1 << 20, interval=2).write(tmp_path_factory.mktemp("long") / "target.gguf")


def test_the_largest_context_that_fits(long_target: Path, tiny_draft: Path) -> None:
    chosen = plan(long_target, tiny_draft, device="cpu", kv_type="f16", vram="1200MiB")
    assert chosen.fits
    assert 0 < chosen.n_ctx < 1 << 20
    assert chosen.total <= 0.95 * 1200
    more = plan(long_target, tiny_draft, device="cpu", kv_type="f16", n_ctx=chosen.n_ctx + 1, vram="1200MiB")
    assert more.total > 0.95 * 1200
    assert more.fits, "asked for by name, a context may use all there is"
    assert plan(long_target, device="cpu", kv_type="f16", vram="64GiB").n_ctx == 1 << 20, (
        "no more than the model was trained for"
    )


def test_auto_takes_the_first_type_that_fits(long_target: Path) -> None:
    totals = {
        kv: plan(long_target, device="cpu", kv_type=kv, n_ctx=1 << 20, vram="1GiB").total
        for kv in ("f16", "q8_0", "q4_0")
    }
    assert totals["f16"] > totals["q8_0"] > totals["q4_0"]
    for kv, total in totals.items():
        for n_ctx in (1 << 20, None):  # left open, it is the context that the model was trained for
            chosen = plan(long_target, device="cpu", n_ctx=n_ctx, vram=int(total / 0.95 * MIB) + MIB)
            assert (chosen.kv_type, chosen.n_ctx, chosen.fits) == ((kv, kv), 1 << 20, True)
    tight = plan(long_target, device="cpu", n_ctx=1 << 20, vram=int(totals["q4_0"] * MIB) + MIB)
    assert (tight.kv_type, tight.fits) == (("q4_0", "q4_0"), True), "the last choice may use all there is"
    smallest = plan(long_target, device="cpu", vram=int(totals["q4_0"] * MIB))
    assert smallest.kv_type == ("q4_0", "q4_0")
    assert smallest.n_ctx < 1 << 20


def test_advice(long_target: Path, tmp_path: Path) -> None:
    """Every change it names makes the plan fit; when no single one does, all together."""
    draft = TinyDraft.of(TinyTarget(), n_ff=65536).write(tmp_path / "draft.gguf")
    at = {"n_ctx": 1 << 20, "kv_type": "f16", "n_batch": 512}
    big = plan(long_target, draft, device="cpu", vram="100GiB", **at)
    assert big.advice == ""
    little_less = plan(long_target, draft, device="cpu", vram=int((big.total - 20) * MIB), **at)
    assert not little_less.fits
    for change in ("kv_type q8_0", "kv_type q4_0", "n_batch 128", "the drafter at Q8_0", "n_ctx "):
        assert change in little_less.advice
    for options in ({"kv_type": "q8_0"}, {"kv_type": "q4_0"}, {"n_batch": 128}):
        assert plan(long_target, draft, device="cpu", vram=int((big.total - 20) * MIB), **{**at, **options}).fits
    together = plan(long_target, draft, device="cpu", kv_type="q4_0", n_batch=128, n_ctx=1 << 20, vram="100GiB")
    much_less = plan(long_target, draft, device="cpu", vram=int((together.total - 20) * MIB), **at)
    assert "kv_type q4_0 with n_batch 128 with the drafter at Q8_0 (" in much_less.advice
    assert "nothing" in plan(long_target, draft, device="cpu", vram="100MiB", **at).advice


def test_a_session_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Before it takes anything: 2**31 - 1 tokens of f32 for four layers are terabytes."""
    n_ctx = 2**31 - 1
    target = TinyTarget(n_ctx=n_ctx, recurrent=(False,) * 4).write(tmp_path / "target.gguf")
    with pytest.raises(pydflash.OutOfMemoryError) as refused:
        pydflash.Session(target, n_ctx=n_ctx, kv_type="f32", n_threads=1)
    text = str(refused.value)
    assert text.startswith(f"a context of {n_ctx} tokens takes ")
    for part in ("target weights", "KV cache", "compute buffer", "total", "left", "what would fit: ", "n_ctx "):
        assert part in text
    assert plan(target, n_ctx=n_ctx, kv_type="f32", device="cpu").fits is False


def test_default_context_is_the_model_s(tiny_target: Path) -> None:
    with pydflash.Session(tiny_target, n_threads=1) as session:
        assert session.n_ctx == TinyTarget().n_ctx
        assert session.plan.kv_type == ("f16", "f16")
        assert session.plan.device == "cpu"


# ---- refusals and the command line -----------------------------------------------------------------------------------


def test_bad_options(tiny_target: Path) -> None:
    for options, sentence in (
        ({"n_ctx": 1 << 20}, "n_ctx is 1048576; it must be 1 to the model's context length of 512"),
        ({"kv_type": "q5_0"}, "kv_type is 'q5_0'"),
        ({"kv_type": ("auto", "f16")}, "kv_type is 'auto'"),
        ({"budget": 64}, "budget is 64"),
        ({"n_ring": 300}, "n_ring is 300; it must be at least n_batch"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"vram": "24 parsecs"}, "vram is '24 parsecs'; it must be a size such as '24GiB'"),
        ({"vram": 0}, "vram is 0"),
        ({"n_context": 1}, "no option 'n_context', did you mean 'n_ctx'"),
    ):
        with pytest.raises(pydflash.ArgumentError, match=sentence.replace("(", r"\(")):
            plan(tiny_target, **options)
    with pytest.raises(pydflash.ModelFileError, match="does not exist"):
        plan(tiny_target.with_name("none.gguf"))


def test_sizes() -> None:
    assert n_bytes("x", "24GiB") == n_bytes("x", " 24 gib ") == 24 << 30
    assert n_bytes("x", "1.5MiB") == 3 << 19
    assert n_bytes("x", "2GB") == 2_000_000_000
    assert n_bytes("x", "4096") == n_bytes("x", 4096) == 4096


def test_command_line(tiny_target: Path, tiny_draft: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pydflash", "plan", "--target", tiny_target, "--draft", tiny_draft, *arguments]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)

    planned = plan(tiny_target, tiny_draft, n_ctx=256, kv_type=("q8_0", "q4_0"), budget=5, n_batch=64, vram="1GiB")
    arguments = ("--n-ctx", 256, "--kv-type", "q8_0,q4_0", "--budget", 5, "--n-batch", 64, "--vram", "1GiB")
    done = run(*arguments)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{planned}\n")
    as_json = json.loads(run(*arguments, "--json").stdout)
    assert as_json["total"] == round(planned.total, 3)
    assert as_json["KV cache"] == round(planned.mib["KV cache"], 3)
    assert as_json["left"] == round(1024 - planned.total, 3)
    counted = [
        v
        for name, v in as_json.items()
        if isinstance(v, float) and name not in (*as_json["aside"], "total", "free", "left")
    ]
    assert sum(counted) == pytest.approx(as_json["total"], abs=0.02)

    small = run("--vram", "1MiB")
    assert small.returncode == 1
    assert "take a smaller model" in small.stdout
    assert small.stderr == "error: it does not fit into 1.0 MiB\n"
    wrong = run("--vram", "much")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: vram is 'much'")
    assert run("--frobnicate").returncode == 2
