"""The measurements of gpu_report.py: each runs in a process of its own, so that a crash takes no other along.

A part is a generator of rows (dicts of plain values). What stands in rows that came before a crash is kept. The report
decides what is run and how it is shown; nothing here writes a file but the rows themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measuring import ROOT, Progress, Timeline, anonymous_mib, document, parted, say

import pydflash
from pydflash._gguf import Gguf
from pydflash.options import kv_type_of
from pydflash.speed import read_pair, step_bytes

Row = dict[str, Any]
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"budget": 0},
    "chain": {"budget": 15, "chain": True},
    "tree of 16": {"budget": 16},
    "tree of 22": {"budget": 22},
    "tree of 32": {"budget": 32},
}
MIB = 1 << 20
DEEP_BUDGET = 22  # nodes of the trees at depth: what a 24 GB card is planned with
QUICK_TESTS = "tree_follows_the_recurrence and 7 or persist_skips"


# ---- the device --------------------------------------------------------------------------------------------------


def device(a: argparse.Namespace) -> Iterator[Row]:
    """What is there: as pydflash sees it."""
    info = pydflash.device_info(a.device)
    yield {"kind": info.kind, "name": info.name, "total_mib": round(info.n_bytes / MIB), "why_cpu": info.why_cpu,
           "free_mib": round(info.n_free / MIB)}  # fmt: skip


# ---- the ops -----------------------------------------------------------------------------------------------------


def tests(a: argparse.Namespace) -> Iterator[Row]:
    """The ops against their float64 definitions: the repository's own tests, on the device."""
    files = [file for file in sorted((ROOT / "tests").glob("test_*.py")) if "mark.device" in file.read_text()]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "device", "--device", a.kind, f"--junitxml={report}"]
        command += ["-k", QUICK_TESTS] if a.quick else []
        start = time.perf_counter()
        done = subprocess.run([*command, *map(str, files)], cwd=ROOT, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if not report.exists():
            last = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
            raise RuntimeError(f"pytest ended with {done.returncode} and no report: {last[-1]}")
        suite = next(ET.parse(report).getroot().iter("testsuite"))
    count = {name: int(suite.get(name, 0)) for name in ("tests", "skipped", "failures", "errors")}
    failed = [c for c in suite.iter("testcase") if c.find("failure") is not None or c.find("error") is not None]
    yield {
        "passed": count["tests"] - count["skipped"] - count["failures"] - count["errors"],
        "failed": count["failures"] + count["errors"],
        "skipped": count["skipped"],
        "seconds": round(seconds, 1),
        "names": ", ".join(str(case.get("name")) for case in failed[:12]),
    }


def ops(a: argparse.Namespace) -> Iterator[Row]:
    """Error and time of the recurrent ops at the 27B's heads; the floor is what they must move over the bandwidth."""
    import numpy as np
    from bench_tree_ops import build, measure

    from tests import test_tree_ops as definitions
    from tests.ggml_ops import Ggml

    ggml = Ggml(device=a.kind)
    ggml.set_n_threads(a.n_threads or len(os.sched_getaffinity(0)))
    d, hk, hv = (32, 4, 8) if a.quick else (128, 16, 48)

    def worst(found: Any, expected: Any) -> float:
        return float(np.abs(found - expected).max() / np.abs(expected).max())

    for n in (1, 7) if a.quick else (1, 17, 23, 64):
        p = definitions.make(definitions.comb(n), d=d, hk=hk, hv=hv, seed=n)
        out, delta, states = definitions.replay(p)
        found_out, found_delta = definitions.run_tree(ggml, p)
        path = definitions.ancestors(p.parent, n - 1)
        verify_error = max(worst(found_out, out), worst(found_delta, delta))
        commit_error = worst(definitions.run_persist(ggml, p, path), states[path[-1]])
        n_layers = 2 if a.quick else 16
        with ggml.graph() as graph:
            runs = build(graph, n, d, hk, hv, n_layers)
            del runs["upstream"]
            times = measure(runs, 0, 0.05 if a.quick else 1.0)  # 0 threads: by the clock on the wall
        nodes = 4 * n * (2 * hk * d + 2 * hv)  # q, k, g, beta
        values = 4 * n * hv * d  # v, out or delta
        state = 4 * hv * d * d
        moved = {"verify": state + nodes + 3 * values, "commit": 2 * state + nodes + values}
        for op, error in (("verify", verify_error), ("commit", commit_error)):
            us = float(statistics.median(times[op])) / n_layers * 1e6
            yield {"op": op, "nodes": n, "heads": f"{hk} / {hv} of {d}", "error": error, "us": round(us, 2),
                   "bytes": moved[op]}  # fmt: skip


# ---- the model ---------------------------------------------------------------------------------------------------


def open_session(a: argparse.Namespace, n_ctx: int, budget: int) -> pydflash.Session:
    return pydflash.Session(
        a.target,
        a.draft,
        device=a.kind,
        n_ctx=n_ctx,
        kv_type=kv_type_of(a.kv_type),
        n_threads=a.n_threads,
        budget=budget,
    )


def open_largest(a: argparse.Namespace, wanted: list[int]) -> tuple[pydflash.Session | None, list[Row]]:
    """A session of the largest n_ctx that the device has room for, and a row for each that it refused."""
    refused: list[Row] = []
    for n_ctx in sorted(wanted, reverse=True):
        try:
            return open_session(a, n_ctx, DEEP_BUDGET), refused
        except pydflash.OutOfMemoryError as error:
            refused.append({"n_ctx": n_ctx, "refused": str(error).splitlines()[0].rstrip(":.")})
    return None, refused


def prompts(a: argparse.Namespace) -> Iterator[Row]:
    """Every shipped prompt, decoded in every way: speed, tokens per pass, time to the first token, where texts part."""
    shipped = json.loads(a.prompts.read_text())["prompts"]
    shipped = [prompt for prompt in shipped if prompt["category"] != "quoting"]  # what they quote is yet to be said
    n_gen = 12 if a.quick else 128
    kept: dict[str, int] = {}
    with open_session(a, 256 if a.quick else 2048, 32) as session:
        ways = list(WAYS.items())[: 3 if a.quick else None]
        for _, options in ways:  # graphs are built and kernels loaded by whoever comes first
            session.generate("Once", max_tokens=8, ignore_eos=True, **options)
        for i, prompt in enumerate(shipped):
            kept[prompt["category"]] = kept.get(prompt["category"], 0) + 1
            if a.quick and kept[prompt["category"]] > 1:
                continue
            ids = session.tokenize(prompt["text"])
            ids = ids[: session.n_ctx - n_gen]
            plain: list[int] = []
            for way, options in ways:
                session.reset()  # or the prompt would not be evaluated again
                start = time.perf_counter()
                first = None
                for chunk in session.stream(ids, max_tokens=n_gen, ignore_eos=True, **options):
                    first = first or time.perf_counter() - start
                    result = chunk.result
                assert first is not None
                assert result is not None
                stats, found = result.stats, result.ids
                plain = plain or found
                at = parted(plain, found)
                margin = None
                if at is not None:
                    row = session.logits(ids + plain[:at])[-1]
                    margin = round(float(abs(row[plain[at]] - row[found[at]])), 5)
                yield {"prompt": i, "category": prompt["category"], "way": way, "n_prompt": len(ids),
                       "n_generated": stats.n_generated, "n_steps": stats.n_steps, "first_ms": round(first * 1e3, 3),
                       "decode_tps": round(stats.decode_tps, 3), "parted_at": at, "margin": margin,
                       **{f"{part}_ms": round(ms, 4) for part, ms in stats.ms.items()}}  # fmt: skip


def depths(a: argparse.Namespace) -> Iterator[Row]:
    """One timeline through a long document: at each depth, some tokens in each way."""
    wanted = [64, 160] if a.quick else [1024, 16 * 1024, 32 * 1024, 64 * 1024, 128 * 1024]
    n_gen = 8 if a.quick else 64
    ways = {way: WAYS[way] for way in ("plain", "chain", f"tree of {DEEP_BUDGET}")}
    room = (n_gen + 1) * len(ways)
    most = a.n_ctx or model_context(a.target)
    session, refused = open_largest(a, [min(depth + room, most) for depth in wanted])
    yield from refused
    if session is None:
        return
    pair = read_pair(a.target, a.draft)
    with session:
        reached = [depth for depth in wanted if depth + room <= session.n_ctx] or [session.n_ctx - room]
        timeline = Timeline(session)
        text = document(session, reached[-1])
        progress = Progress("depths", reached[-1])
        prefill = 0.0
        for depth in reached:
            slices: list[tuple[int, float]] = []

            def after(n: int, seconds: float, slices: list[tuple[int, float]] = slices) -> None:
                slices.append((n, seconds))
                progress(n, seconds)

            prefill += timeline.append(text[timeline.n_tokens : depth], after)
            for way, options in ways.items():
                before = timeline.n_tokens
                found = timeline.decode(n_gen, **options)
                moved = step_bytes(pair, n_nodes=options["budget"] + 1, depth=before, kv_type=session.plan.kv_type)
                yield {"depth": depth, "way": way, "n_prompt": before, "n_generated": len(found.ids),
                       "n_steps": found.n_steps, "first_ms": round((prefill + found.seconds[0]) * 1e3, 2),
                       "prefill_tps": round(slices[-1][0] / slices[-1][1], 2),
                       "step_ms": round(statistics.median(found.seconds) * 1e3, 4),
                       "decode_tps": round(len(found.ids) / sum(found.seconds), 3), "floor_bytes": moved.floor,
                       **{f"{part}_ms": round(statistics.median(ms), 4) for part, ms in found.ms.items()}}  # fmt: skip


def memory(a: argparse.Namespace) -> Iterator[Row]:
    """The plan against what was taken: of the device, or of this process where that is the CPU."""

    def taken() -> float:
        if a.kind == "cpu":
            return anonymous_mib()
        info = pydflash.device_info(a.kind)
        return (info.n_bytes - info.n_free) / MIB

    taken()  # a CUDA device makes its context when it is first asked
    before = taken()
    most = a.n_ctx or model_context(a.target)
    session, refused = open_largest(a, [512] if a.quick else [min(most, n << 10) for n in (8, 16, 32, 64, 128)])
    yield from refused
    if session is None:
        return
    with session:
        opened = taken()
        timeline = Timeline(session)
        timeline.append(document(session, min(session.n_ctx // 2, 2048)))
        for way in ("plain", "chain", f"tree of {DEEP_BUDGET}"):
            timeline.decode(2, **WAYS[way])
        used = taken()
    yield {"what": "before opening", "mib": round(before, 1)}
    yield {"what": f"taken by opening, n_ctx {session.n_ctx:,}", "mib": round(opened - before, 1)}
    yield {"what": "taken by opening and running", "mib": round(used - before, 1)}
    for row in session.plan.rows:
        yield {"what": f"planned: {row.name}", "mib": round(row.mib, 1), "how": row.kind}
    yield {"what": "planned, total", "mib": round(session.plan.total, 1)}


def model_context(target: str) -> int:
    """The context length that the target's file states."""
    with Gguf(target) as file:
        return file.get_int("qwen35.context_length") or 0


def sizes(a: argparse.Namespace) -> Iterator[Row]:
    """Bytes that a step must move: weights of a verify pass and of a draft, KV cache a token, recurrent state."""
    pair = read_pair(a.target, a.draft)
    yield {
        "verify": pair.target.n_bytes + pair.head.n_bytes,
        "draft": pair.drafter.n_bytes + pair.draft_head.n_bytes,
        "kv_per_token": pair.kv_bytes(kv_type_of(a.kv_type)),
        "state": 3 * pair.state,  # read by the verify pass, read and written by the commit
    }


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "device": device,
    "tests": tests,
    "ops": ops,
    "sizes": sizes,
    "prompts": prompts,
    "depths": depths,
    "memory": memory,
}


def run(part: str, a: argparse.Namespace, rows: Path) -> int:
    """Writes the part's rows, one JSON object a line; an exception becomes one line of stderr."""
    with rows.open("w") as file:
        try:
            for row in PARTS[part](a):
                file.write(json.dumps(row) + "\n")
                file.flush()
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            say(f"\n{type(error).__name__}: {error}")
            return 1
    return 0
