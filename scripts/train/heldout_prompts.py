"""Cuts the prompts that acceptance is measured on out of the files the training never sees.

    python scripts/train/heldout_prompts.py --lib /usr/lib/python3.11 --out tests/data/heldout_prompts.json

120 prefixes, as even as can be over common.HELD_OUT, each 300 to 900 characters that end where a line or a word ends.
The output is committed (CPython's text, PSF licence): it must not change when another Python is installed.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from common import HELD_OUT

N_PROMPTS = 120


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--lib", type=Path, required=True, help="Lib folder of CPython 3.11")
    p.add_argument("--out", type=Path, required=True)
    a = p.parse_args()
    rng = random.Random(7)
    prompts = []
    for i in range(N_PROMPTS):
        name = HELD_OUT[i % len(HELD_OUT)]
        text = (a.lib / name).read_text(encoding="utf-8")
        length = rng.randrange(300, 900)
        start = rng.randrange(0, max(1, len(text) - length - 600))
        start = text.find("\n", start) + 1
        end = start + length
        while text[end - 1].isalnum() or text[end - 1] == "_":  # not in the middle of a word
            end -= 1
        prompts.append({"file": name, "text": text[start:end].rstrip(" ")})
    note = "Prefixes of CPython 3.11 standard library files that the tiny pair was not trained on; PSF licence."
    a.out.write_text(json.dumps({"origin": note, "prompts": prompts}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
