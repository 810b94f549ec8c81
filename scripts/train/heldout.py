"""The held-out prefixes that acceptance is measured on, and what counts as a looping continuation.

Owns both, so that training and the runtime's own measurement speak of the same prompts. Needs numpy alone.
"""

from __future__ import annotations

import numpy as np


def prefixes(valid: np.ndarray, count: int) -> list[list[int]]:
    """Prefixes of 16 .. 255 tokens, spread evenly over the held-out files."""
    lengths = np.random.default_rng(7).integers(16, 256, size=count)
    starts = np.linspace(0, len(valid) - 300, count).astype(int)
    return [valid[s : s + n].tolist() for s, n in zip(starts, lengths, strict=True)]


def loops(ids: list[int], tail: int = 24, longest: int = 12) -> bool:
    """Whether the last `tail` tokens repeat with a period of at most `longest`."""
    return len(ids) >= tail + longest and any(
        all(ids[-i] == ids[-i - p] for i in range(1, tail + 1)) for p in range(1, longest + 1)
    )
