"""Task vectors as a stand-in for the data that they were trained on.

A gradient of a weight matrix writes combinations of its inputs, so the rows of a task vector D_t (m, n) lie where the
inputs of its task do, and G_t = D_t^T D_t / |D_t|^2 stands in for their covariance. What a merge M does wrong on them
is sum_t |(M - D_t) G_t^(1/2)|^2, which is least for

    M = (sum_t D_t G_t) (sum_t G_t)^-1

as in RegMean. Inverted softly, M is the sum of the task vectors in directions that no task uses much, and this in
others.

Legend: m rows (outputs) and n columns (inputs) of a weight.

Reference: Cheng et al., WUDI-Merging, ICML 2025, https://arxiv.org/abs/2503.08099; SWUDI, https://arxiv.org/abs/2606.07289.
Differs from the paper: WUDI in closed form, where theirs takes some hundred steps of Adam from the sum.
"""

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

from mergetool.kernels.eigen import add_gram_, checked_eigh, gram_of, mirrored_

_ROUNDING = 1e-12
"""Share of the largest eigenvalue up to which others are 0 for the pseudo-inverse."""
_LEAST = 1e-8
"""What eigenvalues are at least in SWUDI."""


def least_disturbing(deltas: Sequence[Tensor], ridge: float, *, normalize: bool) -> Tensor:
    """M; float64. `ridge` is a share of the mean trace of the G_t; with 0 their sum is inverted where it can be.

    Without `normalize` G_t is D_t^T D_t, so that long task vectors count for more.
    """
    _, grams, applied = _gathered(deltas, normalize=normalize)
    if ridge and bool(grams.any()):
        grams.diagonal().add_(ridge / len(deltas) * grams.diagonal().sum())
        factor, failed = torch.linalg.cholesky_ex(grams)
        if not bool(failed):
            return torch.cholesky_solve(applied.mT, factor).mT
    values, vectors = checked_eigh(grams)
    inverse = torch.where(values > _ROUNDING * values[-1], 1 / values, 0)
    return (applied @ vectors * inverse) @ vectors.mT


def softly_least_disturbing(deltas: Sequence[Tensor], share: float, steepness: float, columns: int) -> Tensor:
    """SWUDI; float64. The leading `share` of `columns` directions (n) is inverted, the more the more tasks use it.

    The task vectors may be cores of matrices with n columns.
    """
    total, grams, applied = _gathered(deltas, normalize=True)
    values, vectors = checked_eigh(grams)
    leading = min(ceil(share * columns), len(values))
    values, vectors = values.flip(0)[:leading].clamp(min=_LEAST), vectors.flip(1)[:, :leading]
    strength = -torch.expm1(-steepness * values)
    along = (applied @ vectors * (strength / values)).sub_(total @ vectors * strength)
    return torch.addmm(total, along, vectors.mT)


def _gathered(deltas: Sequence[Tensor], *, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of D_t, of G_t and of D_t G_t. What is zero adds nothing."""
    total = torch.zeros(deltas[0].shape, dtype=torch.float64, device=deltas[0].device)
    grams, applied = total.new_zeros(total.shape[1], total.shape[1]), total.clone()
    for delta in deltas:
        exact = delta.to(torch.float64)
        size = float(exact.square().sum()) if normalize else 1.0
        if size == 0:
            continue
        total += exact
        if len(exact) < exact.shape[1]:
            add_gram_(grams, exact, 1 / size)
            applied.addmm_(gram_of(exact.mT), exact, alpha=1 / size)  # (D D^T) D: the smaller one
        else:
            gram = gram_of(exact)
            grams.add_(gram, alpha=1 / size)
            applied.addmm_(exact, gram, alpha=1 / size)
    return total, mirrored_(grams), applied
