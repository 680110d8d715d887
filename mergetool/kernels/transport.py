"""Optimal transport between two sets of units: exact, or smoothed by entropy.

Reference: Cuturi, Sinkhorn Distances, NeurIPS 2013, https://arxiv.org/abs/1306.0895 (the smooth one).
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergetool.kernels.extensions import extension

Array: TypeAlias = NDArray[Any]

ROUNDS, CLOSE = 2000, 1e-9


def transport(cost: Array, source: Array, target: Array, smoothing: float) -> Array:
    """The plan (sources, targets) that moves the masses `source` to `target` (both sum to 1) at the least cost.

    `smoothing`: 0 for the exact one, else the strength of the entropy as a share of the mean cost.
    """
    if smoothing > 0:
        return _sinkhorn(cost, source, target, smoothing * float(cost.mean()) or 1.0)
    large, small = max(cost.shape), min(cost.shape)
    even = np.ptp(source) == 0 and np.ptp(target) == 0
    return _assigned(cost) if even and large % small == 0 else _programmed(cost, source, target)


def _assigned(cost: Array) -> Array:
    """Between equal masses, of one side as many times as many as of the other: an assignment."""
    if cost.shape[0] < cost.shape[1]:
        return _assigned(cost.T).T
    times = cost.shape[0] // cost.shape[1]
    rows, columns = extension("scipy.optimize._lsap").linear_sum_assignment(np.repeat(cost, times, axis=1))
    plan = np.zeros(cost.shape)
    plan[rows, columns // times] = 1 / len(rows)
    return plan


def _programmed(cost: Array, source: Array, target: Array) -> Array:
    from scipy.optimize import linprog
    from scipy.sparse import eye, kron, vstack

    rows, columns = cost.shape
    sums = vstack([kron(eye(rows), np.ones(columns)), kron(np.ones(rows), eye(columns))], format="csr")
    sums = sums[:-1]  # the last one follows from the others
    found = linprog(cost.reshape(-1), A_eq=sums, b_eq=np.concatenate([source, target])[:-1], method="highs")
    plan: Array = np.maximum(found.x, 0.0).reshape(cost.shape)
    return plan


def _sinkhorn(cost: Array, source: Array, target: Array, strength: float) -> Array:
    from scipy.special import logsumexp

    scaled = -cost / strength
    with np.errstate(divide="ignore"):
        rows, columns = np.log(source), np.log(target)
    left, right = np.zeros_like(rows), np.zeros_like(columns)
    for _ in range(ROUNDS):
        left = rows - logsumexp(scaled + right, axis=1)
        right = columns - logsumexp(scaled + left[:, None], axis=0)
        plan: Array = np.exp(scaled + left[:, None] + right)
        if np.abs(plan.sum(axis=1) - source).max() < CLOSE * source.max():
            break
    return plan
