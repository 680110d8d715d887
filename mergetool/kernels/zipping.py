"""Units of several networks joined until as many are left as one network has: greedy, the most alike first.

Reference: Stoica et al., ZipIt!, ICLR 2024, https://arxiv.org/abs/2305.03053, section 4 and its appendix.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]


def zip_units(similarity: Array, owners: Array, keep: int, alpha: float, within: float) -> Array:
    """For each unit the number of the joint unit that it becomes a part of, (units,), numbered by first members.

    `similarity` (units, units); `owners[u]` is the model of unit u. A joint unit is as much like another as the least
    alike of its members, times `alpha`. `within`: the share of all joins that may bring units of one model together.
    """
    clusters = _Clusters(np.array(similarity, dtype=np.float64), owners, int(within * (len(owners) - keep)))
    for _ in range(len(owners) - keep):
        clusters.join(alpha)
    return clusters.labels()


class _Clusters:
    """Joint units, and for each the one that it is most like."""

    def __init__(self, similarity: Array, owners: Array, budget: int) -> None:
        self._alike = similarity
        np.fill_diagonal(self._alike, -np.inf)
        self._holds = owners[:, None] == np.unique(owners)[None, :]  # (units, models)
        self._parent = np.arange(len(owners))
        self._budget: int | None = budget
        """How many more joins within a model there may be; None for any number."""
        self._look(np.arange(len(owners)))

    def join(self, alpha: float) -> None:
        """Join the two that are most alike, among those that may be joined."""
        first = int(self._value.argmax())
        if self._value[first] == -np.inf:  # what is left can only be joined within models
            self._budget = None
            self._look(np.flatnonzero(self._parent == np.arange(len(self._parent))))
            first = int(self._value.argmax())
        first, second = sorted((first, int(self._best[first])))
        ran_out = self._pay(first, second)
        alike = np.minimum(self._alike[first], self._alike[second])
        self._alike[first] = self._alike[:, first] = np.where(alike > 0, alpha * alike, alike)
        self._alike[second] = self._alike[:, second] = -np.inf
        self._alike[first, first] = -np.inf
        self._holds[first] |= self._holds[second]
        self._parent[self._parent == second] = first
        self._value[second] = -np.inf
        left = self._value > -np.inf if ran_out else np.isin(self._best, (first, second)) & (self._value > -np.inf)
        left[first] = True
        self._look(np.flatnonzero(left))

    def labels(self) -> Array:
        numbered: Array = np.unique(self._parent, return_inverse=True)[1]
        return numbered

    def _pay(self, first: int, second: int) -> bool:
        """Whether joining these has used up what may be joined within models."""
        if self._budget is None or not (self._holds[first] & self._holds[second]).any():
            return False
        self._budget -= 1
        return self._budget == 0

    def _look(self, rows: Array) -> None:
        """See anew what some units are most like."""
        if len(rows) == len(self._parent):
            self._best, self._value = np.zeros(len(rows), dtype=np.int64), np.full(len(rows), -np.inf)
        alike = self._alike[rows]
        if self._budget == 0:
            shared = self._holds[rows].astype(np.int64) @ self._holds.T.astype(np.int64)
            alike = np.where(shared > 0, -np.inf, alike)
        self._best[rows] = alike.argmax(axis=1)
        self._value[rows] = alike.max(axis=1)
