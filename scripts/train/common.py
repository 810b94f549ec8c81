"""What every training stage shares: the work folder, the special tokens, the held-out files, the clock and the pids.

Owns nothing that computes. A stage takes `--work DIR` and reads and writes only there and in models/.
"""

from __future__ import annotations

import argparse
import atexit
import os
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"

VOCAB_SIZE = 4096
# The last ids of the vocabulary, in this order; names are Qwen3.5's own, <|mask|> is the drafter's.
SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
    "<|mask|>",
]
FIRST_SPECIAL = VOCAB_SIZE - len(SPECIALS)
SPECIAL_ID = {name: FIRST_SPECIAL + i for i, name in enumerate(SPECIALS)}
EOT, IM_START, IM_END = (SPECIAL_ID[s] for s in SPECIALS[:3])
MASK = SPECIAL_ID["<|mask|>"]

# Never trained on, in any version of the library, nor used as a prefix for the target's own text.
HELD_OUT = [
    "asyncio/queues.py",
    "concurrent/futures/thread.py",
    "configparser.py",
    "contextlib.py",
    "csv.py",
    "dataclasses.py",
    "email/utils.py",
    "fractions.py",
    "graphlib.py",
    "heapq.py",
    "http/cookies.py",
    "json/decoder.py",
    "logging/handlers.py",
    "sched.py",
    "shlex.py",
    "string.py",
    "textwrap.py",
    "wave.py",
]

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def parser(doc: str | None) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", type=Path, default=ROOT / "build" / "train", help="folder for everything intermediate")
    return p


def announce(work: Path) -> None:
    """Add this process to WORK/PIDS for as long as it lives, so that others can pause it (SIGSTOP) while they time."""
    work.mkdir(parents=True, exist_ok=True)
    path, me = work / "PIDS", str(os.getpid())
    with path.open("a") as f:
        f.write(me + "\n")

    def leave() -> None:
        lines = [line for line in path.read_text().split() if line != me]
        path.write_text("".join(line + "\n" for line in lines))

    atexit.register(leave)


def append_row(curve: Path, **columns: object) -> None:
    """Adds a row to a CSV file, whose header comes with the first."""
    with curve.open("a") as f:
        if f.tell() == 0:
            f.write(",".join(columns) + "\n")
        f.write(",".join(map(str, columns.values())) + "\n")


def save_state(checkpoint: Path, **state: object) -> None:
    """torch.save that leaves the old file or the new one, whenever it is interrupted."""
    import torch

    part = checkpoint.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, checkpoint)


def log(message: str) -> None:
    print(time.strftime("%H:%M:%S ") + message, flush=True)
