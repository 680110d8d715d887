"""Nearest orthonormal matrices by products and triangular systems alone: what a GPU is fast at.

Halley's iteration with weights that are best for singular values in [l, 1] takes those to 1 in five steps even for
l = 1e-8; each step needs a Gram matrix, its Cholesky factor, and two triangular systems. Directions far below l stay
near 0 over these steps, so that what is null is left out rather than filled.

Reference: Nakatsukasa, Bai and Gygi, Optimizing Halley's iteration for computing the matrix polar decomposition, SIMAX
2010 (QDWH); Nakatsukasa and Higham, SISC 2013 (its form with Cholesky factors).
"""

import math

import torch
from torch import Tensor

_STEPS = 5
_ORTHONORMAL = 1e-7
"""Mean error of columns up to which a result is taken."""
_NULL = 1e-9
"""The same, where directions may be null, each of which is to be whole or nothing."""


def nearest_orthonormal(x: Tensor, smallest: float) -> Tensor | None:
    """The polar factor of x (m, K), K <= m, float64, without directions far below `smallest` of the largest.

    None where it cannot be told from a result that is not right: directions lie about where they count as null.
    """
    if x.shape[0] > 2 * x.shape[1] and (nearest := _by_small_factor(x, smallest)) is not None:
        return nearest
    nearest = _iterated(x, smallest)
    square = nearest.mT @ nearest
    return nearest if _size(square @ square - square) < _NULL else None


def _by_small_factor(x: Tensor, smallest: float) -> Tensor | None:
    """From x = Q R with R from the Gram matrix, if x is not too ill-conditioned: polar(x) = x R^-1 polar(R)."""
    r, failed = torch.linalg.cholesky_ex(x.mT @ x, upper=True)
    if int(failed):
        return None
    nearest: Tensor = x @ torch.linalg.solve_triangular(r, _iterated(r, smallest), upper=True)
    square = nearest.mT @ nearest
    square.diagonal().sub_(1)
    return nearest if _size(square) < _ORTHONORMAL else None  # false for NaN, too


def _size(error: Tensor) -> float:
    return float(torch.linalg.matrix_norm(error)) / math.sqrt(len(error))


def _iterated(x: Tensor, smallest: float) -> Tensor:
    x = x / _largest(x)
    for _ in range(_STEPS):
        a, b, c, smallest = _weights(smallest)
        inner = x.mT @ x * c
        inner.diagonal().add_(1)
        r, _ = torch.linalg.cholesky_ex(inner, upper=True)
        turned = torch.linalg.solve_triangular(r, x, upper=True, left=False)
        turned = torch.linalg.solve_triangular(r.mT, turned, upper=False, left=False)
        x = x * (b / c) + turned * (a - b / c)
    return x


def _largest(x: Tensor) -> float:
    """The largest singular value, or a little more: a value just above 1 does the iteration no harm."""
    vector = torch.ones_like(x[0])
    for _ in range(10):
        vector = x.mT @ (x @ vector)
        vector = vector / torch.linalg.vector_norm(vector)
    return 1.1 * float(torch.linalg.vector_norm(x @ vector))


def _weights(low: float) -> tuple[float, float, float, float]:
    """a, b, c of x (a + b x^2) / (1 + c x^2), which takes [low, 1] nearest to 1, and what it takes low to."""
    low = min(low, 1.0)
    d = (4 * (1 - low**2) / low**4) ** (1 / 3)
    root = math.sqrt(1 + d)
    a = root + math.sqrt(max(0.0, 8 - 4 * d + 8 * (2 - low**2) / (low**2 * root))) / 2
    b = (a - 1) ** 2 / 4
    c = a + b - 1
    return a, b, c, low * (a + b * low**2) / (1 + c * low**2)
