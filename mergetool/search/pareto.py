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
