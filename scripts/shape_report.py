#!/usr/bin/env python3
"""What a pair of full size costs on this machine's CPU: loading, memory against the plan, prefill, decoding.

    python scripts/make_shape.py --shape 27b --out shapes/27b
    python scripts/shape_report.py shapes/27b            # prints Markdown; RESULTS.md holds its output
    python scripts/shape_report.py shapes/4b --n-prompt 64 --json out.json

Loads the pair twice, the first time with its files dropped from the page cache; prefills a random prompt and decodes
it plainly, then again with trees, and compares the two. Where they part, the margin between the target's two
likeliest tokens there is shown: a pass over one token and one over a tree round differently, so near-ties may flip.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Progress, Timeline, drop_cache

import pydflash
from pydflash import Session

LIMIT = 24 << 30


def status() -> dict[str, int]:
    """This process' memory in bytes: anon, file (mapped pages that are resident), peak."""
    fields = {"RssAnon": "anon", "RssFile": "file", "VmHWM": "peak"}
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {fields[name[:-1]]: int(rest[0]) << 10 for name, *rest in lines if name[:-1] in fields}


def progress(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


class Report:
    """One pair, measured step by step."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.target, self.draft = options.folder / "target.gguf", options.folder / "draft.gguf"
        self.out: dict[str, Any] = {
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
            "file_bytes": {path.name: path.stat().st_size for path in (self.target, self.draft)},
        }
        self.session_options: dict[str, Any] = {
            "n_ctx": options.n_ctx,
            "kv_type": options.kv_type,
            "n_batch": options.n_batch,
            "budget": options.budget,
            "n_threads": options.n_threads,
        }

    def open(self) -> Session:
        return Session(self.target, self.draft, **self.session_options)

    def load(self, name: str) -> Session:
        """Opens the pair and runs one drafted step, which reads every weight of both."""
        progress(f"loading, {name}")
        start = time.perf_counter()
        session = self.open()
        opened = time.perf_counter()
        timeline = Timeline(session)
        timeline.append([1, 2])
        timeline.decode(2, budget=1, n_steps=1)
        self.out[f"load_{name}"] = {"open_s": opened - start, "first_step_s": time.perf_counter() - opened}
        return session

    def decode(self, session: Session, name: str, budget: int, n_steps: int) -> list[int]:
        """Prefill, then n_steps steps."""
        timeline = Timeline(session)
        prefill_s = timeline.append(self.prompt, Progress(f"prefill, {name}", len(self.prompt)))
        progress(f"{n_steps} {name} steps")
        decoded = timeline.decode(session.n_ctx - timeline.n_tokens, budget=budget, n_steps=n_steps)
        self.out[name] = {
            "prefill_s": prefill_s,
            "prefill_tps": (len(self.prompt) - 1) / prefill_s,
            "step_s": sum(decoded.seconds) / n_steps,
            "tokens": len(decoded.ids),
            "steps": n_steps,
        }
        return decoded.ids

    def compare(self, session: Session, plain: list[int], tree: list[int]) -> None:
        n = min(len(plain), len(tree))
        same = next((i for i in range(n) if plain[i] != tree[i]), n)
        self.out["compared"], self.out["same"] = n, same
        if same < n:
            progress(f"they part at token {same}: measuring the margin there")
            row = np.sort(session.logits([*self.prompt, *plain[:same]])[-1])
            self.out["margin"], self.out["spread"] = float(row[-1] - row[-2]), float(row.std())

    def run(self) -> dict[str, Any]:
        o, before = self.options, status()
        for path in (self.target, self.draft):
            drop_cache(path)
        session = self.load("cold")
        session.close()
        gc.collect()
        session = self.load("warm")
        self.out["plan"] = session.plan.as_dict()
        self.prompt = np.random.RandomState(o.seed).randint(0, session.n_vocab, o.n_prompt).tolist()
        plain = self.decode(session, "plain", 0, o.plain)
        tree = self.decode(session, "tree", o.budget, o.tree)
        after = status()
        self.out["memory"] = {**after, "anon_grown": after["anon"] - before["anon"]}
        self.compare(session, plain, tree)
        self.out["memory"]["peak"] = status()["peak"]
        session.close()
        return self.out


def gib(n: float) -> str:
    return f"{n / 2**30:.2f}"


def mib(n: float) -> str:
    return f"{n / 2**20:,.0f}"


def markdown(r: dict[str, Any]) -> str:
    mapped = sum(r["plan"][name] for name in MAPPED)
    ours = r["plan"]["total"] - mapped
    if r["same"] == r["compared"]:
        verdict = f"{r['compared']} of {r['compared']} tokens equal"
    else:
        verdict = (
            f"the first {r['same']} of {r['compared']} equal; there the two likeliest tokens are {r['margin']:.4f} "
            f"apart (standard deviation of the logits {r['spread']:.2f})"
        )
    rows = [
        ("files", " + ".join(f"{name} {gib(n)} GiB" for name, n in r["file_bytes"].items())),
        *(
            (f"load, {name}", f"open {r[key]['open_s']:.2f} s, first step {r[key]['first_step_s']:.1f} s")
            for name, key in (("page cache dropped", "load_cold"), ("page cache warm", "load_warm"))
        ),
        ("weights, mapped", f"planned {mapped:,.0f} MiB, resident {mib(r['memory']['file'])} MiB of file pages"),
        (
            "everything else",
            f"planned {ours:,.0f} MiB, grown by {mib(r['memory']['anon_grown'])} MiB of anonymous memory",
        ),
        ("peak", f"{gib(r['memory']['peak'])} GiB resident, of the 24 GiB allowed"),
        *(
            (
                f"{name}, {r[name]['steps']} steps",
                f"prefill {r[name]['prefill_s']:.1f} s ({r[name]['prefill_tps']:.2f} tokens/s), "
                f"{r[name]['step_s']:.2f} s a step, {r[name]['tokens']} tokens",
            )
            for name in ("plain", "tree")
        ),
        ("tree against plain", verdict),
    ]
    return "\n".join([r["machine"], "", "| | |", "|-|-|", *(f"| {a} | {b} |" for a, b in rows)])


MAPPED = ("target weights", "drafter weights", "token embedding, on the host")


def main(arguments: list[str] | None = None) -> int:
    about, _, epilog = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, help="with target.gguf and draft.gguf, as make_shape.py writes them")
    parser.add_argument("--n-prompt", type=int, default=512, metavar="N", help="prompt tokens (default 512)")
    parser.add_argument("--plain", type=int, default=8, metavar="N", help="plain steps (default 8)")
    parser.add_argument("--tree", type=int, default=4, metavar="N", help="tree steps (default 4)")
    parser.add_argument("--budget", type=int, default=15, metavar="N", help="tree nodes besides the root (default 15)")
    parser.add_argument("--n-ctx", type=int, default=4096, metavar="N", help="context (default 4096)")
    parser.add_argument("--n-batch", type=int, default=512, metavar="N", help="prefill chunk (default 512)")
    parser.add_argument("--kv-type", default="f16", metavar="TYPE", help="KV cache (default f16)")
    parser.add_argument("--n-threads", type=int, metavar="N", help="default: one a core")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the prompt (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there")
    options = parser.parse_args(arguments)
    if min(options.n_prompt - 1, options.plain, options.tree) < 1:
        parser.error("--n-prompt must be at least 2, --plain and --tree at least 1")
    try:
        result = Report(options).run()
    except (pydflash.PydflashError, OSError) as error:
        print(f"shape_report: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))
    return 0 if result["memory"]["peak"] <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
