"""Task vectors in one orthonormal basis of the directions of all, with smoothed spectra.

The leading singular vectors of all tasks side by side, made orthogonal, are bases U and V in which each task vector is
a matrix C_t = U^T D_t V, with few large entries: on the block of the task itself. There entries of different tasks mean
the same thing, and can be merged one by one; of the result only the blocks of single tasks are kept.

Legend: m rows and n columns of a weight, k triplets of one task, K triplets of all tasks together.

Reference: Zhang et al., DC-Merge, CVPR 2026, https://arxiv.org/abs/2603.06242.
Differs from the paper: directions that carry nothing are left out, as in `spectral`.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mergetool.kernels.consensus import agreeing_mean_, keep_largest_
from mergetool.kernels.spectral import Factors, concatenated, polar

_ROUNDING = 1e-12
"""Share of the largest entry below which one is rounding."""

Smoothing = Literal["average", "linear", "none"]


def smoothed(s: Tensor, smoothing: Smoothing, rho: float) -> Tensor:
    """Singular values (descending) brought nearer to each other, their sum unchanged.

    linear: in a straight line that starts at `rho` times its end, or less where the values themselves are nearer.
    """
    if smoothing == "none" or not len(s):
        return s
    steepest = min(rho, float(s[0] / s[-1])) if smoothing == "linear" else 1.0
    line = torch.linspace(steepest, 1.0, len(s), dtype=s.dtype, device=s.device)
    return line * (s.sum() / line.sum())


def merged_in_common_basis(tasks: Sequence[Factors], density: float, *, vote: bool) -> Tensor:
    """The sum of what tasks do in the directions of all, block by block, by a vote on every entry or without one.

    Of each task's entries the largest share is kept, and at least as many as it has directions. float64, (m, n).
    """
    every = concatenated(tasks)
    if not every.rank:
        return every.dense()
    left, right = polar(every.u), polar(every.v)
    cores = [_core(left, task, right, density) for task in tasks]
    if vote:
        core = agreeing_mean_(cores, [1.0] * len(cores), scratch=lambda _: torch.empty_like(cores[0]))
    else:
        core = torch.stack(cores).sum(0)
    blocks, start = torch.zeros_like(core), 0
    for task in tasks:
        own = slice(start, start := start + task.rank)
        blocks[own, own] = core[own, own]
    return left @ blocks @ right.mT


def _core(left: Tensor, task: Factors, right: Tensor, density: float) -> Tensor:
    """U^T D_t V, trimmed. Of directions that are strangers rounding is left, which is not to be counted as a voice."""
    core = (left.mT @ (task.u * task.s)) @ (task.v.mT @ right)
    keep_largest_(core, _ROUNDING * float(core.abs().max()), inclusive=False)
    return trim_(core, density, task.rank)


def trim_(x: Tensor, density: float, least: int = 1) -> Tensor:
    """Zero, in place, all but the largest `density` of the entries, or `least`; those equal to the last stay."""
    count = max(least, 1, int(density * x.numel()))
    if count < x.numel():
        threshold = x.abs().reshape(-1).kthvalue(x.numel() - count + 1).values
        keep_largest_(x, float(threshold), inclusive=True)
    return x
