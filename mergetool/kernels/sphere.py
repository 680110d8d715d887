"""Means and paths on a sphere, computed from inner products alone.

N vectors of any length span at most N dimensions. Points of the sphere in that space are combinations of the vectors,
and lengths and angles between them follow from the matrix of inner products; so the vectors themselves are read once
for that matrix and once for the result, however many steps lie between.
"""

import torch
from torch import Tensor


def slerp_factors(gram: Tensor, t: float) -> Tensor:
    """Factors (K, 2) of the great circle from a vector to another at `t`, for inner products (K, 2, 2).

    Where the two are parallel or opposite, or one is zero, there is no circle and the factors are those of the line.
    (With opposite vectors a sine below 0.001 divides rounding errors, with parallel ones the line is as good.)
    """
    aa, bb, ab = gram[:, 0, 0], gram[:, 1, 1], gram[:, 0, 1]
    lengths = aa.sqrt() * bb.sqrt()
    cosine = torch.where(lengths > 0, ab / lengths.clamp(min=torch.finfo(lengths.dtype).tiny), 1.0).clamp(-1.0, 1.0)
    straight = 1.0 - cosine.square() <= 1e-6
    angle = torch.where(straight, 1.0, cosine.acos())
    ends = torch.tensor([1.0 - t, t], dtype=gram.dtype, device=gram.device)
    return torch.where(straight[:, None], ends, (ends * angle[:, None]).sin() / angle.sin()[:, None])


def unit_gram(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Inner products (N, N) of the directions, and lengths (N,); a vector of zeros has no direction: products 0."""
    lengths = gram.diagonal().sqrt()
    inverse = torch.where(lengths > 0, 1.0 / lengths, 0.0)
    return gram * inverse[:, None] * inverse, lengths


def mean_direction(units: Tensor, shares: Tensor) -> Tensor | None:
    """The direction of a weighted sum of directions, as factors (N,) on these; None where they cancel."""
    length = _length(shares, units)
    return None if length <= 1e-8 * float(shares.abs().sum()) else shares / length


def karcher_mean(units: Tensor, shares: Tensor, max_iter: int, tol: float) -> Tensor:
    """Factors (N,) on directions that make the point with the least weighted sum of squared angles to them.

    From the mean direction (or, where directions cancel, from the first one) it goes along the mean of the arcs to all
    directions, until that is shorter than `tol`. Those without a direction are left out.
    """
    shares = torch.where(units.diagonal() > 0, shares, 0.0)
    shares = shares / shares.sum()
    mean = mean_direction(units, shares)
    point = torch.eye(len(units), dtype=units.dtype)[int(shares.gt(0).nonzero()[0])] if mean is None else mean
    for _ in range(max_iter):
        cosines = (units @ point).clamp(-1.0, 1.0)
        angles = cosines.acos()
        near = angles < tol  # nothing to add, and nothing to divide by; what is opposite has no shortest arc
        arcs = torch.where(near | (angles.sin() < 1e-8), 0.0, shares * angles / angles.sin())
        step = arcs - (arcs @ cosines) * point
        length = _length(step, units)
        if length < tol:
            break
        point = torch.tensor(length).cos() * point + torch.tensor(length).sin() / length * step
        point = point / _length(point, units)
    return point


def _length(factors: Tensor, units: Tensor) -> float:
    return float((factors @ units @ factors).clamp(min=0.0).sqrt())
