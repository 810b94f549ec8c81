"""How well counts fit an expected distribution."""

from __future__ import annotations

import math
import statistics

import numpy as np
import numpy.typing as npt


def chi_square_p(observed: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """Chance of a fit as bad or worse (Wilson and Hilferty's approximation, 1931); rare cells go together."""
    observed, expected = np.asarray(observed, float).ravel(), np.asarray(expected, float).ravel()
    assert observed[expected == 0].sum() == 0
    rare = expected < 10
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    if freedom == 0:
        return 1.0
    statistic = float(((observed - expected) ** 2 / expected).sum())
    z = ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))
    return 1 - statistics.NormalDist().cdf(z)
