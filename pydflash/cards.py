"""Graphics cards as their makers state them, and speeds that other projects have published for them.

Facts alone: nothing here was measured by this project, and nothing is computed.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from pydflash.errors import ArgumentError, nearest

MIB = 1 << 20
# Of 24,576 MiB an idle RTX 3090 has about 24,240 to give.
TAKEN_BY_THE_DRIVER = 336 * MIB


class Card(NamedTuple):
    """bandwidth: GB/s of its memory. gib: its memory. tflops: of its tensor cores in f16, without sparsity; int8 runs
    at twice that on all of these."""

    bandwidth: float
    gib: int
    tflops: float

    @property
    def n_bytes(self) -> int:
        """What of its memory a program can have."""
        return (self.gib << 30) - TAKEN_BY_THE_DRIVER


CARDS = {  # by the end of the name that a driver gives them
    "RTX 3090": Card(936, 24, 142),
    "RTX 3090 Ti": Card(1008, 24, 160),
    "RTX 4080": Card(717, 16, 195),
    "RTX 4080 SUPER": Card(736, 16, 209),
    "RTX 4090": Card(1008, 24, 330),
    "RTX 5080": Card(960, 16, 225),
    "RTX 5090": Card(1792, 32, 419),
    "RTX A6000": Card(768, 48, 155),
    "RTX 6000 Ada": Card(960, 48, 364),
    "L4": Card(300, 24, 121),
    "L40S": Card(864, 48, 362),
    "A10": Card(600, 24, 125),
    "A100-SXM4-40GB": Card(1555, 40, 312),
    "A100-SXM4-80GB": Card(2039, 80, 312),
    "A100-PCIE-40GB": Card(1555, 40, 312),
    "A100 80GB PCIe": Card(1935, 80, 312),
    "H100 PCIe": Card(2000, 80, 756),
    "H100 80GB HBM3": Card(3350, 80, 989),
}


def find_card(name: str) -> str:
    """The key in CARDS of a card as people call it: "3090", "rtx4090", "A6000". Raises ArgumentError."""
    known = {_short(key): key for key in CARDS}
    wanted = _short(name)
    if wanted in known:
        return known[wanted]
    several = [key for short, key in known.items() if wanted and short.startswith(wanted)]
    if len(several) == 1:
        return several[0]
    if several:
        raise ArgumentError(f"gpu is {name!r}, which may be {' or '.join(several)}; give more of the name")
    near = nearest(wanted, known)
    raise ArgumentError(
        f"gpu is {name!r}, which is not known here{near}; known are {', '.join(CARDS)}. "
        "For another card give --bandwidth and --vram"
    )


def _short(name: str) -> str:
    return re.sub(r"nvidia|geforce|rtx|[^a-z0-9]", "", name.lower())


def bandwidth_of(device_name: str) -> float | None:
    """GB/s of a device by the name its driver gives, None when it is none of CARDS; the longest that fits counts."""
    fitting = [known for known in CARDS if re.search(rf"\b{re.escape(known)}\b", device_name)]
    return float(CARDS[max(fitting, key=len)].bandwidth) if fitting else None


class Published(NamedTuple):
    """A speed that somebody else measured, with somebody else's program.

    budget: tree nodes besides the root, 0 for plain decoding. accepted: tokens a step.
    depth: tokens of context, about. kv_type: that a prediction beside it counts; at a depth of 256 it hardly matters.
    what: the text that was generated and what differs. source: where it is told.
    """

    card: str
    budget: int
    accepted: float
    depth: int
    kv_type: str
    tokens_per_second: float
    what: str
    source: str


# All for one pair, Qwen3.5-27B in Q4_K_M and its DFlash drafter: layers, width and general.file_type of the target.
PUBLISHED_FOR = (64, 5120, 15)
_LUCE = "Luce-Org/lucebox-hub, dflash/RESULTS.md"
_WU = "tianchengwu.com, 2026-04-05"
PUBLISHED = (
    Published("RTX 3090", 0, 1.0, 256, "f16", 37.78, "HumanEval", _LUCE),
    Published("RTX 3090", 22, 8.31, 256, "f16", 129.52, "HumanEval", _LUCE),
    Published("RTX 3090", 22, 7.04, 256, "f16", 110.51, "MATH-500", _LUCE),
    Published("RTX 3090", 22, 6.14, 256, "f16", 96.15, "GSM8K", _LUCE),
    Published("RTX 3090", 15, 7.64, 256, "f16", 125.3, "HumanEval, an earlier run", _LUCE),
    Published("RTX 3090", 40, 8.90, 256, "f16", 105.1, "HumanEval, an earlier run", _LUCE),
    Published("RTX 3090", 0, 1.0, 256, "f16", 33.65, "HumanEval, run again by others", "insiderllm.com"),
    Published("RTX 3090", 22, 7.66, 256, "f16", 92.74, "HumanEval, run again by others", "insiderllm.com"),
    Published("RTX 4090", 0, 1.0, 256, "f16", 32.20, "HumanEval, WSL2", _LUCE),
    Published("RTX 4090", 28, 7.77, 256, "f16", 125.37, "HumanEval, WSL2, drafter in Q4_K_M", _LUCE),
    Published("RTX 4090", 0, 1.0, 1024, "q4_0", 39.3, "llama.cpp, half of 2K filled", _WU),
    Published("RTX 4090", 0, 1.0, 65536, "q4_0", 33.4, "llama.cpp, half of 128K filled", _WU),
    Published("RTX 5090", 0, 1.0, 256, "f16", 42.34, "HumanEval, Qwen3.6-27B", _LUCE),
    Published("RTX 5090", 40, 12.93, 256, "f16", 205.02, "HumanEval, Qwen3.6-27B", _LUCE),
)
