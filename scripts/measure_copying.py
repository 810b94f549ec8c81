#!/usr/bin/env python3
"""Measure what copying from the timeline gives: tokens per target pass with and without it, and what a search costs.

    python scripts/measure_copying.py               # the shipped pair; a few minutes
    python scripts/measure_copying.py --prompts 10 --csv copying.csv

Every prompt is continued twice from one prefill, greedily and by as many tokens, once with copying and once without;
the error given is one standard error of the paired difference. Kinds of prompts:

- ordinary: the 120 prefixes of tests/data/heldout_prompts.json, and windows of 512 tokens of the held-out files.
- quoting itself: a text of the model's own, a few blank lines, and how that text began: again, with a name changed,
  and with the clauses of a licence for beginnings. A small model goes on as it did before, more or less.
- dictated: functions given again with another name, and quoted clauses, as they stand in the sources. A model that can
  quote would say them; this one is made to, by a mask that lets only their next token through. Drafter, copier and
  tree know nothing of that.

Prints Markdown. The prior of the copier's rates (src_cpp/spec/copier.cpp) was measured on every second of the 120
prefixes, on 24 windows and on texts quoted from 24 of the prefixes and from the clauses.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from measuring import BUDGET, PROMPTS, ROOT, Timeline, counted, document, heldout, library, machine, table, write_csv
from train.common import HELD_OUT

import pydflash
from pydflash._lib import check, ffi, lib
from pydflash.bench.figures import loops

LICENCE = ROOT / "LICENSES" / "PSF-2.0.txt"
N_BEGIN = 160  # tokens at most of a beginning that is quoted
N_SEEN = 24  # tokens of a dictated text that the prompt shows


# ---- prompts -----------------------------------------------------------------------------------------------------


def clauses() -> list[str]:
    """Paragraphs of the licence that the standard library comes under."""
    return [part.strip() for part in re.split(r"\n\s*\n", LICENCE.read_text()) if len(part) > 200]


def own_text_again(session: pydflash.Session, begin: str, n_tokens: int, change: bool) -> list[int] | None:
    """begin, what the model says behind it, and begin again, with its most frequent name changed if so wanted. None
    where the model ends in a loop, which every drafter predicts."""
    ids = session.tokenize(begin)[-N_BEGIN:]
    begin = session.detokenize(ids)
    names = re.findall(r"[A-Za-z_]{4,}", begin)
    timeline = Timeline(session)
    timeline.append(ids)
    said = timeline.decode(n_tokens, budget=BUDGET).ids
    if loops(said) or not names:
        return None
    again = begin
    if change:
        again = begin.replace(max(sorted(set(names)), key=names.count), "another")
    return ids + said + session.tokenize("\n\n\n" + again)


def functions() -> Iterator[str]:
    """Functions and methods of the held-out files."""
    for name in HELD_OUT:
        if (library() / name).exists():
            text = (library() / name).read_text(encoding="utf-8")
            yield from re.findall(r"^ *def .*?(?=^\S|^ *def |\Z)", text, re.DOTALL | re.MULTILINE)


def spread(items: list[Any], count: int) -> list[Any]:
    """`count` of them, evenly."""
    return [items[i * len(items) // count] for i in range(min(count, len(items)))]


# ---- measuring ---------------------------------------------------------------------------------------------------


@contextmanager
def dictated(session: pydflash.Session, timeline: Timeline, text: list[int]) -> Iterator[None]:
    """The model says this text behind the timeline's end, whatever it thinks of it."""
    begin = timeline.n_tokens

    @ffi.callback("int(void *, const int32_t *, int32_t, uint32_t *)")  # type: ignore[untyped-decorator]
    def mask(_user: Any, _path: Any, n: int, bits: Any) -> int:
        token = text[timeline.n_tokens - begin + n]
        bits[token // 32] |= 1 << token % 32
        return 0

    allowed = ffi.callback("int(void *, const int32_t *, int32_t)", lambda user, path, n: 1)
    forced = ffi.callback("int(void *, int32_t *, int32_t)", lambda user, out, most: 0)
    constraint = ffi.new(
        "pf_constraint *", {"n_vocab": session.n_vocab, "mask": mask, "allowed": allowed, "forced": forced}
    )
    constraint.size = ffi.sizeof("pf_constraint")
    check(lib.pf_session_constrain(session._core.session, constraint))
    try:
        yield
    finally:
        check(lib.pf_session_constrain(session._core.session, ffi.NULL))


def passes(session: pydflash.Session, prompt: list[int], n_tokens: int, text: list[int] | None) -> dict[str, Any]:
    """Target passes with and without copying for the same tokens."""
    timeline = Timeline(session)
    timeline.append(prompt)
    mark = timeline.mark()
    found = {}
    for copying in (False, True):
        timeline.back_to(mark)
        if text is None:
            found[copying] = timeline.decode(n_tokens, budget=BUDGET, copying=copying)
        else:
            with dictated(session, timeline, text):
                found[copying] = timeline.decode(len(text), budget=BUDGET, copying=copying)
    return {
        "tokens": len(found[True].ids),
        "without": found[False].n_steps,
        "with": found[True].n_steps,
        "copied": found[True].n_copied,
        "same": found[False].ids == found[True].ids,
        "loops": text is None and loops(found[False].ids),
    }


def summary(kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens per pass over all prompts of a kind, and their ratio with its standard error (of a ratio of sums)."""
    tokens = sum(row["tokens"] for row in rows)
    without, with_copying = (np.array([row[key] for row in rows], np.float64) for key in ("without", "with"))
    ratio = without.sum() / with_copying.sum()
    residual = without - ratio * with_copying
    error = residual.std(ddof=1) * len(rows) ** 0.5 / with_copying.sum() if len(rows) > 1 else float("nan")
    return {
        "prompts of": kind,
        "n_prompts": len(rows),
        "same_text": sum(row["same"] for row in rows),
        "without": round(tokens / without.sum(), 4),
        "with": round(tokens / with_copying.sum(), 4),
        "ratio": round(ratio, 4),
        "ratio_error": round(error, 4),
        "copied": round(sum(row["copied"] for row in rows) / tokens, 4),
    }


def search_times(ids: list[int], n_search: int = 10_000) -> dict[str, float]:
    """Microseconds of this process's time, with len(ids) tokens in the index."""
    n = len(ids)
    tokens = ffi.new("int32_t[]", ids)
    at, length = ffi.new("int64_t[]", n_search), ffi.new("int32_t[]", n_search)

    def run(n_before: int, n: int, first: int) -> float:
        n_runs = 0
        start = time.process_time()
        while (passed := time.process_time() - start) < 1:  # the clock may tick in hundredths of a second
            check(lib.pf_copy_matches(tokens, n_before, tokens, n, first, at, length))
            n_runs += 1
        return passed / n_runs * 1e6

    grow = run(0, n, n)
    return {
        "add a token": grow / n,
        "take one back": max(0.0, run(n, 0, 0) - grow) / n,
        "search": (run(0, n, n - n_search) - grow) / n_search,
    }


def main() -> None:
    about, _, details = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(
        description=about, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--prompts", type=int, default=120, help="at most so many of each kind (default: all)")
    p.add_argument("--n-gen", type=int, default=96, help="tokens from each (default: 96)")
    p.add_argument("--document", type=int, default=100_000, help="tokens of the searched text (default: 100,000)")
    p.add_argument("--n-threads", type=int)
    p.add_argument("--csv", type=Path, help="write the figures here too")
    a = p.parse_args()

    begins = [entry["text"] for entry in json.loads(PROMPTS.read_text())["prompts"]]
    found: dict[str, list[dict[str, Any]]] = {}

    def measure(kind: str, prompt: list[int] | None, text: list[int] | None = None) -> None:
        if prompt is not None:
            found.setdefault(kind, []).append(passes(session, prompt, a.n_gen, text))

    with pydflash.Session(kv_type="f32", n_ctx=2048, n_threads=a.n_threads) as session:
        for begin in counted("ordinary", spread(begins, a.prompts)):
            measure("ordinary: 120 prefixes", session.tokenize(begin))
        for window in counted("windows", heldout(session, HELD_OUT, min(a.prompts, 40), 512)):
            measure("ordinary: windows of 512 tokens", window)
        for begin in counted("quoting itself", spread(begins, min(a.prompts, 40))):
            measure("quoting itself: again", own_text_again(session, begin, a.n_gen, False))
            measure("quoting itself: a name changed", own_text_again(session, begin, a.n_gen, True))
        for begin in counted("clauses", spread(clauses(), a.prompts)):
            measure("quoting itself: behind clauses", own_text_again(session, begin, a.n_gen, False))
        cut = [
            (session.tokenize(f"{old}\n"), session.tokenize(old.replace(re.findall(r"def (\w+)", old)[0], "changed")))
            for old in functions()
        ]
        cut = [(old, new) for old, new in cut if 2 * N_SEEN < len(new) <= 400]
        for old, new in counted("dictated functions", spread(cut, min(a.prompts, 40))):
            measure("dictated: a function renamed", old + new[:N_SEEN], new[N_SEEN : N_SEEN + a.n_gen])
        for clause in counted("dictated clauses", spread(clauses(), a.prompts)):
            old, new = session.tokenize(clause + "\n\n"), session.tokenize("> " + clause.replace("\n", "\n> "))
            measure("dictated: quoted clauses", old + new[:N_SEEN], new[N_SEEN : N_SEEN + a.n_gen])
        times = search_times(document(session, a.document))
    report(found, times, a)


def report(found: dict[str, list[dict[str, Any]]], times: dict[str, float], a: argparse.Namespace) -> None:
    """Prints the tables, and writes them where --csv says."""
    rows = []
    for kind, results in found.items():
        rows.append(summary(kind, results))
        straight = [row for row in results if not row["loops"]]
        if kind.startswith("ordinary") and 0 < len(straight) < len(results):
            rows.append(summary(f"{kind}, those that do not loop", straight))
    if a.csv:
        write_csv(a.csv, rows)
    header = ["prompts", "number", "same text", "without", "with copying", "ratio", "of the tokens copied"]
    body = [
        (r["prompts of"], r["n_prompts"], r["same_text"], f"{r['without']:.3f}", f"{r['with']:.3f}",
         f"{r['ratio']:.3f} ± {r['ratio_error']:.3f}", f"{100 * r['copied']:.0f}%")
        for r in rows
    ]  # fmt: skip
    print(f"Tokens per target pass, a tree of {BUDGET}, {a.n_gen} greedy tokens a prompt, f32 KV cache. {machine()}.\n")
    print(table(header, body))
    shown = ", ".join(f"{what} {value:.3g}" for what, value in times.items())
    print(f"\nIndex of {a.document:,} tokens, microseconds of processor time: {shown}.")


if __name__ == "__main__":
    main()
