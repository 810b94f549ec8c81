"""What rounder caches and a shorter memory cost: logit errors and accepted length, by KV type and by drafter's ring.

The `kv` and `ring` parts of long_context.py, which is what to run.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from measuring import BUDGET, DRAFTED, Timeline, counted, document, heldout, say, table, timed
from train.common import HELD_OUT

from tests.reference_drafter import ReferenceDrafter

if TYPE_CHECKING:
    from long_context import Bench

TAIL = 512  # rows of logits compared at the end of each text
Logits = npt.NDArray[np.float32]


# ---- KV types ----------------------------------------------------------------------------------------------------


def kv(bench: Bench) -> None:
    """The same texts with every cache type: the last rows of logits against F32's and F16's, and tokens per pass."""
    plan = bench.plan
    with timed("kv"):
        found = {kv_type: measure_kv(bench, kv_type) for kv_type in ("f32", "f16", "q8_0", "q4_0")}
        if bench.a.unrotated:
            found["q4_0, not rotated"] = measure_elsewhere(bench, "q4_0")
        else:
            say("q4_0 without rotation needs a build of its own, see --unrotated; its row is left out")
    rows = []
    for name, this in found.items():
        for depth in map(str, plan.kv_depths):
            row: dict[str, Any] = {"kv_type": name, "depth": int(depth)}
            for reference in ("f32", "f16"):
                errors = error(this[depth], found[reference][depth])
                row |= {f"{what}_{reference}": value for what, value in errors.items()}
            row["tokens_per_pass"] = round(float(this["per_pass"].mean()), 4)
            row["of_f16"], row["of_f16_error"] = ratio(this["per_pass"], found["f16"]["per_pass"])
            rows.append(row)
    header = ["KV cache", "depth", "logit NMSE against F32", "against F16", "KL against F16, nats", "other top-1"]
    body = [
        (r["kv_type"], f"{r['depth']:,}", *(f"{r[k]:.2g}" for k in ("nmse_f32", "nmse_f16", "kl_f16")),
         f"{100 * r['other_top_f16']:.1f}%", f"{r['tokens_per_pass']:.3f}", plus_minus(r["of_f16"], r["of_f16_error"]))
        for r in rows
    ]  # fmt: skip
    note = (
        f"Logits: the last {rows_compared(bench)} positions of one document a depth. Tokens per pass: "
        f"{plan.kv_prompts} held-out prompts of {plan.kv_prompt_length} tokens, {plan.n_gen} tokens each, a tree of "
        f"{BUDGET}; ± is one standard error of the paired difference."
    )
    bench.write("kv", rows, f"{table([*header, 'tokens per pass', 'of F16'], body)}\n\n{note}")


def rows_compared(bench: Bench) -> int:
    return min(TAIL, min(bench.plan.kv_depths) // 2)


def measure_kv(bench: Bench, kv_type: str) -> dict[str, npt.NDArray[Any]]:
    """Logits at the end of each depth's text [rows, n_vocab], and each prompt's tokens per pass, by one cache type."""
    plan = bench.plan
    out: dict[str, npt.NDArray[Any]] = {}
    n_ctx = max(*plan.kv_depths, plan.kv_prompt_length + plan.n_gen)
    with bench.session(kv_type, n_ctx=n_ctx) as session, timed(f"kv, {kv_type}"):
        text = document(session, max(plan.kv_depths))
        for depth in plan.kv_depths:
            out[str(depth)] = session.logits(text[:depth])[-rows_compared(bench) :].copy()
        per_pass = []
        prompts = heldout(session, HELD_OUT, plan.kv_prompts, plan.kv_prompt_length)
        for prompt in counted(f"prompts, {kv_type}", prompts):
            timeline = Timeline(session)
            timeline.append(prompt)
            per_pass.append(timeline.decode(plan.n_gen, **DRAFTED).per_pass)
        out["per_pass"] = np.array(per_pass)
    return out


def measure_elsewhere(bench: Bench, kv_type: str) -> dict[str, npt.NDArray[Any]]:
    """measure_kv in another process, on the build that --unrotated names."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kv.npz"
        script = Path(__file__).with_name("long_context.py")
        command = [sys.executable, str(script), "kv", "--measure-only", kv_type, str(file)]
        command += ["--target", str(bench.target), "--draft", str(bench.draft)]
        command += ["--quick"] if bench.a.quick else []
        for option in ("n_ctx", "n_batch", "n_threads", "rope_theta"):
            if (value := getattr(bench.a, option)) is not None:
                command += [f"--{option.replace('_', '-')}", str(value)]
        path = f"{Path(bench.a.unrotated).resolve()}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})
        with np.load(file) as loaded:
            return dict(loaded)


def error(found: Logits, expected: Logits) -> dict[str, float]:
    """Of logits [n, n_vocab]: squared error over the squared spread of the rows, mean KL divergence from `expected` in
    nats, and the share of rows whose likeliest token is another."""
    a, b = (x - x.mean(1, keepdims=True) for x in (found.astype(np.float64), expected.astype(np.float64)))
    log_p, log_q = (x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True)
                    for x in (b, a))  # fmt: skip
    return {
        "nmse": float(((a - b) ** 2).sum() / (b**2).sum()),
        "kl": float((np.exp(log_p) * (log_p - log_q)).sum(1).mean()),
        "other_top": float((a.argmax(1) != b.argmax(1)).mean()),
    }


def ratio(found: npt.NDArray[np.float64], base: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Mean of `found` over mean of `base`, and one standard error of the paired difference in the same unit."""
    difference = (found - base) / base.mean()
    spread = difference.std(ddof=1) / math.sqrt(len(difference)) if len(difference) > 1 else math.nan
    return round(float(1 + difference.mean()), 4), round(float(spread), 4)


def plus_minus(value: float, spread: float) -> str:
    return f"{value:.3f} ± {spread:.3f}"


# ---- the drafter's ring ------------------------------------------------------------------------------------------


def ring(bench: Bench) -> None:
    """Drafter logits against a float64 reference around and past the ring's end; tokens per pass against a ring that is
    longer than any prompt."""
    plan = bench.plan
    n_ring = plan.rings[-1][0]
    with timed("ring"):
        exact = [
            {"what": "logits", "n_ring": n_ring, "depth": depth, **errors}
            for depth, errors in ring_errors(bench, n_ring)
        ]
        cost = [
            {
                "what": "tokens per pass",
                "n_ring": slots,
                "from": lengths[0],
                "depth": lengths[-1],
                **ring_cost(bench, slots, lengths, count),
            }
            for slots, lengths, count in plan.rings
        ]
    first = table(
        ["n_ring", "position", "largest error", "of a reference that sees one position more", "that evicts nothing"],
        [
            (n_ring, f"{r['depth']:,}",
             *(f"{r[k]:.1e}" if k in r else "-" for k in ("error", "error_of_one_more", "error_of_all")))
            for r in exact
        ],
    )  # fmt: skip
    second = table(
        ["n_ring", "tokens of a prompt", "prompts", "documents", "tokens per pass", "unlimited", "ratio"],
        [
            (r["n_ring"], " to ".join(dict.fromkeys((f"{r['from']:,}", f"{r['depth']:,}"))), r["prompts"],
             r["documents"], f"{r['per_pass']:.3f}", f"{r['unlimited']:.3f}", plus_minus(r["ratio"], r["ratio_error"]))
            for r in cost
        ],
    )  # fmt: skip
    note = (
        "The drafter's logits behind a prompt, against float64 numpy over exactly the last n_ring positions, in units "
        f"of the largest logit; F32 weights and caches. Tokens per pass: a tree of {BUDGET}, {plan.n_gen} tokens from "
        "each prompt, the beginning of a held-out document, with a ring of n_ring and with one longer than any "
        "prompt; ± is one standard error of the paired difference of documents."
    )
    bench.write("ring", [*exact, *cost], f"{first}\n\n{second}\n\n{note}")


def ring_errors(bench: Bench, n_ring: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Positions, and the largest error over the largest logit: against the reference, and against references that see
    one position too many or all of them."""
    drafter = ReferenceDrafter(bench.legal_target(f32=True), bench.f32_draft())
    n_ctx = max(bench.plan.ring_depths) + 1
    with bench.session("f32", f32=True, n_ctx=n_ctx, n_ring=n_ring, n_batch=min(bench.a.n_batch, n_ring)) as session:
        text = document(session, n_ctx)
        for n in bench.plan.ring_depths:
            features = session.hidden(text[:n], drafter.target_layers)
            found = session.draft_logits(text[: n + 1])
            seen = {"error": n_ring, "error_of_one_more": n_ring + 1, "error_of_all": n}
            expected = {
                name: drafter.logits(features, text[n], k)
                for name, k in seen.items()
                if name == "error" or n_ring < k <= n
            }
            yield n, {name: float(np.abs(found - e).max() / np.abs(e).max()) for name, e in expected.items()}


def ring_cost(bench: Bench, n_ring: int, lengths: Sequence[int], count: int) -> dict[str, Any]:
    """Tokens per pass with the ring and with one that never evicts, behind the first tokens of the same documents."""
    n_gen = bench.plan.n_gen
    n_ctx = lengths[-1] + n_gen
    per_pass: dict[int, list[list[float]]] = {}  # by document, by length
    texts: dict[int, list[list[int]]] = {}
    for slots in (n_ring, n_ctx):
        with bench.session("f32", n_ctx=n_ctx, n_ring=slots, n_batch=min(bench.a.n_batch, n_ring)) as session:
            per_pass[slots], texts[slots] = [], []
            documents = heldout(session, HELD_OUT, count, lengths[-1])
            for text in counted(f"documents of {lengths[-1]}, ring of {slots}", documents):
                timeline = Timeline(session)
                per_pass[slots].append([])
                for length in lengths:
                    timeline.append(text[timeline.n_tokens : length])
                    here = timeline.mark()
                    decoded = timeline.decode(n_gen, **DRAFTED)
                    timeline.back_to(here)
                    per_pass[slots][-1].append(decoded.per_pass)
                    texts[slots].append(decoded.ids)
    short, long = np.array(per_pass[n_ring]).mean(1), np.array(per_pass[n_ctx]).mean(1)
    of_unlimited, spread = ratio(short, long)
    return {
        "prompts": count * len(lengths),
        "documents": count,
        "per_pass": round(float(short.mean()), 4),
        "unlimited": round(float(long.mean()), 4),
        "ratio": of_unlimited,
        "ratio_error": spread,
        "same_text": sum(a == b for a, b in zip(texts[n_ring], texts[n_ctx], strict=True)),
    }
