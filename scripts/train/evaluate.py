"""Stage 8: the honest figures, measured by the runtime on held-out prefixes.

    python scripts/train/evaluate.py --json build/train/evaluation.json

Needs pydflash installed, and valid.npy in --work (stage 1 makes it). Greedy, a fixed number of tokens from each of many
prefixes of held-out files; mean tokens committed per target pass for plain, chain and trees, with looping continuations
set apart; and whether each way gave plain decoding's text. Refuses fewer than 100 prefixes unless told otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from common import log, parser
from heldout import loops, prefixes

from pydflash import Session

MODES = {
    "chain": {"budget": 15, "chain": True},
    "tree8": {"budget": 8},
    "tree16": {"budget": 16},
    "tree32": {"budget": 32},
}


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--target", type=Path, help="default: the pair that ships with pydflash")
    p.add_argument("--draft", type=Path)
    p.add_argument("--prefixes", type=int, default=160)
    p.add_argument("--tokens", type=int, default=40)
    p.add_argument("--kv-type", default="f32")
    p.add_argument("--n-threads", type=int, help="default: one for each core")
    p.add_argument("--allow-few", action="store_true", help="take fewer than 100 prefixes")
    p.add_argument("--json", type=Path, help="write the figures here too")
    a = p.parse_args()
    if a.prefixes < 100 and not a.allow_few:
        raise SystemExit("fewer than 100 prefixes say little: pass --allow-few to go on")
    prompts = prefixes(np.load(a.work / "valid.npy"), a.prefixes)
    out: dict[str, dict[str, float]] = {}
    with Session(a.target, a.draft, kv_type=a.kv_type, n_threads=a.n_threads) as s:
        options = {"max_tokens": a.tokens, "ignore_eos": True}
        plain = [s.generate(x, budget=0, **options) for x in prompts]
        looping = [loops(r.ids) for r in plain]
        log(f"{len(prompts)} prefixes x {a.tokens} tokens, {sum(looping)} of them looping")
        for name, mode in MODES.items():
            runs = [s.generate(x, **mode, **options) for x in prompts]
            row: dict[str, float] = {"same_text": sum(r.ids == q.ids for r, q in zip(runs, plain, strict=True))}
            for kind, want in (("not_looping", False), ("looping", True)):
                mine = [r.stats for r, loop in zip(runs, looping, strict=True) if loop is want]
                steps = sum(x.n_steps for x in mine)
                row[kind] = round(sum(x.n_generated for x in mine) / steps, 3) if steps else float("nan")
            row["decode_tps"] = round(float(np.median([r.stats.decode_tps for r in runs])), 1)
            out[name] = row
            log(
                f"{name:7s} tokens per target pass {row['not_looping']:.2f}, looping {row['looping']:.2f}; "
                f"text as plain {row['same_text']}/{len(prompts)}; {row['decode_tps']:.0f} tok/s"
            )
        out["plain"] = {"decode_tps": round(float(np.median([r.stats.decode_tps for r in plain])), 1)}
    if a.json:
        a.json.write_text(
            json.dumps(
                {"prefixes": len(prompts), "tokens": a.tokens, "looping": sum(looping), "figures": out}, indent=1
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
