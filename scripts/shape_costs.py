#!/usr/bin/env python3
"""What a pass over a pair of a released size costs here, and what 6 and 8 accepted tokens a pass would give.

    python scripts/make_shape.py --shape 27b --out shapes/27b-8 --target-type bf16 --layers 8
    python scripts/shape_costs.py shapes/4b shapes/27b-8 --threads 2 1       # prints Markdown

The weights say nothing, so each pass that shall accept 6 or 8 tokens is given what the target said off the clock, with
wrong tokens behind: see peers/pydflash_worker.py. A pass of n nodes is a root and n - 1 drafted tokens. Of a pair that
make_shape.py cut to some layers, the last columns say what the whole would take: drafting as measured, the rest in
proportion to the weights that a pass reads. That is an estimate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
from measuring import machine, say, table, timed
from peers.pydflash_worker import N_LINE, passes

import pydflash

ARMS: dict[str, dict[str, Any]] = {
    "1 node": {"budget": 0},
    **{f"{n + 1} nodes": {"budget": n, "chain": True} for n in (3, 7, N_LINE)},
    **{f"{N_LINE + 1} nodes, {n} tokens": {"accepted": n} for n in (6, 8)},
}
HEADS = ["a pass", "of it drafting, ms", "ms", "tokens/s", "to plain"]
OF_WHOLE = ["ms, of the whole", "tokens/s", "to plain"]


def main(arguments: list[str] | None = None) -> int:
    about, _, epilog = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folders", nargs="+", type=Path, help="each with a target.gguf and a draft.gguf")
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", help="default: all cores")
    parser.add_argument("--n-prompt", type=int, default=64, metavar="N", help="tokens before (default 64)")
    parser.add_argument("--passes", type=int, default=5, metavar="N", help="of each kind (default 5)")
    args = parser.parse_args(arguments)
    print(f"{machine()}; {args.passes} passes behind {args.n_prompt} tokens.")
    for folder in args.folders:
        for n_threads in args.threads or [None]:
            try:
                print("\n".join(["", *measured(folder, n_threads, args.n_prompt, args.passes)]), flush=True)
            except pydflash.PydflashError as error:
                say(f"shape_costs: {error}")
                return 1
    return 0


def measured(folder: Path, n_threads: int | None, n_prompt: int, n_passes: int) -> Iterator[str]:
    """The lines of one pair at one number of threads."""
    target = folder / "target.gguf"
    options: dict[str, Any] = {"n_ctx": n_prompt + 1024, "kv_type": "f16", "n_threads": n_threads, "device": "cpu"}
    with pydflash.Session(target, folder / "draft.gguf", **options) as session:
        ids = [(i * 7919 + 13) % session.n_vocab for i in range(n_prompt)]
        found: dict[str, dict[str, Any]] = {}
        for arm, shape in ARMS.items():
            with timed(f"{folder.name}, {arm}"):
                if "accepted" not in shape:
                    passes(session, ids, 1, **shape)  # finds weights and graphs cold
                found[arm] = passes(session, ids, n_passes, **shape)
    name, more = whole(target)
    rows = []
    for arm, run in found.items():
        cells = [arm, f"{run['ms']['draft'] / n_passes:.1f}", *gains(found, arm, 1.0)]
        rows.append(cells if more == 1 else [*cells, *gains(found, arm, more)])
    plain = found["1 node"]
    threads = f"{n_threads or 'all'} thread{'' if n_threads == 1 else 's'}"
    yield f"{name}, {target.stat().st_size / 1e9:.1f} GB, {threads}."
    yield f"Prefill: {plain['n_prefilled'] / plain['prefill_seconds']:.1f} tokens/s."
    yield ""
    yield table(HEADS if more == 1 else HEADS + OF_WHOLE, rows)


def gains(found: dict[str, dict[str, Any]], arm: str, more: float) -> list[str]:
    """Milliseconds a pass, tokens a second and their ratio to plain decoding's, the target `more` times as large.
    Where nothing is to be accepted a pass gives one token."""

    def seconds(name: str) -> float:
        draft = found[name]["ms"]["draft"] / 1e3
        return float(draft + (found[name]["decode_seconds"] - draft) * more) / found[name]["n_passes"]

    n_tokens = ARMS[arm].get("accepted", 1)
    rate = n_tokens / seconds(arm)
    return [f"{seconds(arm) * 1e3:.1f}", f"{rate:.2f}", f"{rate * seconds('1 node'):.2f}"]


def whole(path: Path) -> tuple[str, float]:
    """A target's name and type, and how many times the weights that a pass reads the whole has that it was cut from."""
    reader = gguf.GGUFReader(path)
    keys = {name: reader.fields[name].contents() for name in reader.fields if not name.startswith("tokenizer.")}
    bytes_of = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
    if "output.weight" in bytes_of:
        del bytes_of["token_embd.weight"]  # of which a row a token is read
    layers = sum(n for name, n in bytes_of.items() if name.startswith("blk."))
    added = layers * (keys.get("pydflash.shape.layers", keys["qwen35.block_count"]) / keys["qwen35.block_count"] - 1)
    kind = gguf.LlamaFileType(keys["general.file_type"]).name.removeprefix("MOSTLY_")
    return f"{keys['general.name']}, {kind}", 1 + added / sum(bytes_of.values())


if __name__ == "__main__":
    sys.exit(main())
