"""Whether a model is as often right as it is sure: reliability by confidence, and the expected calibration error.

Reference: Guo et al. (2017), On Calibration of Modern Neural Networks: bins of equal width; ECE is the mean
distance between the share that is right and the mean confidence, weighted by the items of each bin.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 15


def reliability(right: NDArray[np.float64], confidence: NDArray[np.float64], bins: int = BINS) -> list[dict[str, Any]]:
    """A row for each bin that holds items: how many, how sure the model was, and how often it was right.

    A bin holds its upper end, the first one its lower end, too.
    """
    places = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    rows = []
    for place in np.unique(places):
        own = places == place
        facts = {"low": float(place / bins), "high": float((place + 1) / bins), "items": int(own.sum())}
        rows.append(facts | {"confidence": float(confidence[own].mean()), "right": float(right[own].mean())})
    return rows


def calibration_error(rows: list[dict[str, Any]]) -> float:
    """The expected calibration error."""
    total = sum(row["items"] for row in rows)
    return float(sum(row["items"] * abs(row["right"] - row["confidence"]) for row in rows) / total)
