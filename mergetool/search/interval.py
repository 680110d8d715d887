"""How far a mean of scores in [0, 1] may be off: 95 % confidence intervals."""

import math

import numpy as np
from numpy.typing import NDArray

_Z = 1.959964


def of_mean(values: NDArray[np.float64]) -> tuple[float, float]:
    """Wilson's interval of a mean of scores: it stays inside [0, 1], and is not empty where all scores are equal."""
    n, mean = len(values), float(values.mean())
    centre = (mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def of_difference(first: NDArray[np.float64], second: NDArray[np.float64]) -> tuple[float, float]:
    """Interval of the mean of `first - second`, scores of two models on the same items: what items share cancels."""
    apart = first - second
    half = _Z * float(apart.std(ddof=1)) / math.sqrt(len(apart)) if len(apart) > 1 else math.inf
    return float(apart.mean()) - half, float(apart.mean()) + half
