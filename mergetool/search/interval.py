"""How far a mean of scores in [0, 1] may be off: 95 % confidence intervals."""

import math
from collections.abc import Sequence

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


def of_weighted_difference(
    pairs: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]], weights: Sequence[float]
) -> tuple[float, float]:
    """Interval of the weighted mean (weights add up to 1) of differences, one pair of arrays for each task."""
    apart = [first - second for first, second in pairs]
    centre = sum(weight * float(part.mean()) for weight, part in zip(weights, apart, strict=True))
    errors = [float(part.std(ddof=1)) / math.sqrt(len(part)) if len(part) > 1 else math.inf for part in apart]
    half = _Z * math.sqrt(sum((weight * error) ** 2 for weight, error in zip(weights, errors, strict=True)))
    return centre - half, centre + half
