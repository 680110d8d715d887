"""What a matrix has beside the directions of another one: orthogonal projections for merging one after the other."""

import torch
from torch import Tensor

from mergetool.kernels.spectral import live_factors


def outside(matrix: Tensor, other: Tensor, share: float) -> Tensor:
    """The matrix (m, n) without what it has in common with another one, in float64.

    Of the other one's singular directions, leading ones that hold at most `share` of the sum of its singular values
    are closed: what leads from any of these to any of these goes. Of every other direction goes what it has in common
    with the matrix: the entry from the right vector to its own left one.
    """
    known = live_factors(other, min(other.shape))
    matrix = matrix.to(torch.float64)
    closed = int((known.s.cumsum(0) <= share * known.s.sum()).sum())
    image, first = matrix @ known.v, known.u[:, :closed]
    common = known.u * (known.u * image).sum(0)
    common[:, :closed] = first @ (first.mT @ image[:, :closed])
    return torch.addmm(matrix, common, known.v.mT, alpha=-1)
