#!/usr/bin/env python3
"""Measure a pair on held-out prompts: tokens per target pass, speed, and where drafting changes the text.

    python scripts/measure.py                      # the shipped pair; about 3 minutes on 2 quiet cores
    python scripts/measure.py --prompts 20 --json out.json

Greedy, a fixed number of tokens from each prompt of tests/data/heldout_prompts.json, in rounds that interleave the
ways of decoding, so that a noisy machine is noisy for all of them. Prints Markdown: RESULTS.md holds its output.
Prompts whose plain continuation ends in a loop are counted apart, since every drafter predicts a loop.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measuring import PARTS, PROMPTS, counted, parted, table

import pydflash
from pydflash.bench.figures import loops

WAYS: dict[str, dict[str, Any]] = {
    "plain": {"budget": 0},
    "chain": {"budget": 15, "chain": True},
    "tree, 8 nodes": {"budget": 8},
    "tree, 16 nodes": {"budget": 16},
    "tree, 32 nodes": {"budget": 32},
    "tree, 63 nodes": {"budget": 63},
}
DRAFTER_ALONE = ", the drafter alone"  # what runs again in a session that does not copy
KV_TYPES = ["f32", "f16", "q8_0", "q4_0"]


def acceptance(texts: list[str], n_tokens: int, open_session: Callable[..., pydflash.Session]) -> dict[str, Any]:
    """Tokens per target pass and speed of every way, over all prompts."""
    runs: dict[str, list[pydflash.Result]] = {}
    # One session after the other: the threads of an idle one still look out for work for a while.
    alone = [way for way in WAYS if way != "plain"]
    for copying, ways, suffix in ((True, [*WAYS], ""), (False, alone, DRAFTER_ALONE)):
        with open_session(kv_type="f16", copying=copying) as session:
            for text in counted("prompt", texts):
                for way in ways:
                    found = session.generate(text, max_tokens=n_tokens, ignore_eos=True, **WAYS[way])
                    runs.setdefault(way + suffix, []).append(found)
    looping = [loops(result.ids) for result in runs["plain"]]
    out: dict[str, Any] = {"n_prompts": len(texts), "n_looping": sum(looping), "ways": {}}
    for way, results in runs.items():
        row: dict[str, Any] = {"same_text": sum(a.ids == b.ids for a, b in zip(results, runs["plain"], strict=True))}
        for name, wanted in (("mean_accepted", False), ("mean_accepted_looping", True)):
            chosen = [r.stats for r, loop in zip(results, looping, strict=True) if loop == wanted]
            steps = sum(s.n_steps for s in chosen)
            row[name] = sum(s.n_generated for s in chosen) / steps if steps else None
        row["decode_tps"] = statistics.median(r.stats.decode_tps for r in results)
        steps = sum(r.stats.n_steps for r in results)
        row["step_ms"] = {name: sum(r.stats.ms[name] for r in results) / steps for name in results[0].stats.ms}
        out["ways"][way] = row
    return out


def divergence(session: pydflash.Session, prompts: list[list[int]], n_tokens: int) -> dict[str, Any]:
    """How often a tree of 16 nodes parts from plain decoding, and how far apart the two tokens were for the target."""
    margins = []
    for prompt in prompts:
        plain = session.generate(prompt, budget=0, max_tokens=n_tokens, ignore_eos=True).ids
        tree = session.generate(prompt, budget=16, max_tokens=n_tokens, ignore_eos=True).ids
        at = parted(plain, tree)
        if at is not None:
            row = session.logits(prompt + plain[:at])[-1]
            margins.append(float(abs(row[plain[at]] - row[tree[at]])))
    return {"n_prompts": len(prompts), "n_diverged": len(margins), "margins": sorted(margins)}


def main() -> None:
    about, _, details = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(
        description=about, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--target", help="default: the pair that ships with pydflash")
    p.add_argument("--draft")
    p.add_argument("--prompts", type=int, default=120, help="how many (default: all 120)")
    p.add_argument("--n-gen", type=int, default=40, help="tokens from each (default: 40)")
    p.add_argument("--n-threads", type=int)
    p.add_argument("--json", type=Path, help="write the figures here too")
    a = p.parse_args()

    texts = [x["text"] for x in json.loads(PROMPTS.read_text())["prompts"][: a.prompts]]
    out: dict[str, Any] = {}
    open_session = partial(pydflash.Session, a.target, a.draft, n_ctx=1024, n_threads=a.n_threads)
    out["acceptance"] = acceptance(texts, a.n_gen, open_session)
    out["divergence"] = {}
    for kv_type in KV_TYPES:
        with open_session(kv_type=kv_type) as session:
            prompts = [session.tokenize(text) for text in texts[:60]]
            out["divergence"][kv_type] = divergence(session, prompts, a.n_gen)
    if a.json:
        a.json.write_text(json.dumps(out, indent=1) + "\n")
    print(markdown(out, a.n_gen))


def markdown(out: dict[str, Any], n_tokens: int) -> str:
    """The tables of RESULTS.md."""
    acc = out["acceptance"]
    plain = acc["ways"]["plain"]["decode_tps"]
    rows: list[list[object]] = []
    for way, row in acc["ways"].items():
        plain_text, looping = row["mean_accepted"], row["mean_accepted_looping"]
        # Every prompt gave as many tokens, so passes add up by prompts.
        parts = [(acc["n_prompts"] - acc["n_looping"], plain_text), (acc["n_looping"], looping)]
        everything = acc["n_prompts"] / sum(n / x for n, x in parts if x)
        shown = ["-" if x is None else f"{x:.2f}" for x in (everything, plain_text, looping)]
        ms = ", ".join(f"{row['step_ms'][name]:.2f}" for name in PARTS)
        tps = row["decode_tps"]
        rows.append([way, *shown, f"{tps:.0f}", f"{tps / plain:.2f}", ms])
    parting: list[list[object]] = []
    for kv_type, row in out["divergence"].items():
        margins = row["margins"]
        shown = [f"{np.median(margins):.4f}", f"{max(margins):.4f}"] if margins else ["-", "-"]
        parting.append([kv_type, f"{row['n_diverged']} of {row['n_prompts']}", *shown])
    return "\n".join(
        [
            f"{acc['n_prompts']} held-out prompts x {n_tokens} tokens, greedy, F16 KV cache; {acc['n_looping']} of the "
            f"continuations loop and are counted apart. {platform.machine()}, Python {platform.python_version()}.",
            "",
            table(
                [
                    "",
                    "tokens per target pass",
                    "not looping",
                    "looping",
                    "tokens/s",
                    "of plain",
                    f"{', '.join(PARTS)} ms",
                ],
                rows,
            ),
            "",
            f"Where a tree of 16 nodes parts from plain decoding within {n_tokens} tokens, and by how much the target "
            "then preferred one token to the other (logits):",
            "",
            table(["KV cache", "prompts that part", "median margin", "largest margin"], parting),
        ]
    )


if __name__ == "__main__":
    main()
