"""Several objectives at once: which candidates no other one beats in all of them."""

import numpy as np
from numpy.typing import NDArray


def front(scores: NDArray[np.float64]) -> list[int]:
    """Places of the rows (n, objectives; higher is better) that no other row dominates, of equal rows the first.

    Sorted by the first objective, best first.
    """
    kept = []
    for place, row in enumerate(scores):
        at_least = (scores >= row).all(axis=1)
        dominated = (at_least & (scores > row).any(axis=1)).any()
        repeated = (scores[:place] == row).all(axis=1).any()
        if not dominated and not repeated:
            kept.append(place)
    return sorted(kept, key=lambda place: (-scores[place, 0], place))


def hypervolume(scores: NDArray[np.float64], worst: NDArray[np.float64]) -> float:
    """Area (two objectives) between the point `worst` and what the rows dominate; higher is better."""
    points = scores[front(scores)]
    points = points[(points > worst).all(axis=1)]
    area, height = 0.0, float(worst[1])
    for first, second in points[np.argsort(-points[:, 0])]:
        if second > height:
            area += float((first - worst[0]) * (second - height))
            height = float(second)
    return area
