"""Slow waves taken out of a matrix: a filter on its two-dimensional Fourier transform."""

import math

import torch
from torch import Tensor

_COUNTS = torch.fft.fftfreq, torch.fft.rfftfreq
"""Frequencies along both axes, of a transform of which one half is stored; at most 1/2."""


def high_pass(matrix: Tensor, cutoff: float) -> Tensor:
    """Without the waves (m, n) whose frequency is below `cutoff`: 0 keeps all, 1 all but the very fastest.

    A wave's frequency is the root mean square of those along both axes, each from 0 (constant) to 1 (the next entry has
    the opposite sign).
    """
    rows, columns = (count(size, dtype=torch.float64) for count, size in zip(_COUNTS, matrix.shape, strict=True))
    long = (matrix.shape[0] > 1) + (matrix.shape[1] > 1)
    if cutoff == 0.0 or not long:
        return matrix
    squares = (2 * rows[:, None]).square() + (2 * columns).square()
    return _filtered(matrix, squares >= long * cutoff * cutoff)


def near_fastest(matrix: Tensor, radius: float) -> Tensor:
    """Only the waves whose place in the transform is at most `radius`, as a share of the shorter axis, from its middle.

    Places are counted as they are stored, so in the middle are the fastest waves. Of a square all is kept from 0.71 on;
    along the longer axis of a matrix waves go that are slow along this one.
    """
    rows, columns = matrix.shape
    y, x = torch.arange(rows)[:, None] - rows // 2, torch.arange(columns) - columns // 2
    kept = (y.square() + x.square() <= math.floor((radius * min(rows, columns)) ** 2)).to(matrix.dtype)
    mirrored = kept.roll((-1, -1), (0, 1)).flip(0, 1)  # a real matrix has every wave twice, and its real part is wanted
    return _filtered(matrix, (kept + mirrored)[:, : columns // 2 + 1] / 2)


def _filtered(matrix: Tensor, factors: Tensor) -> Tensor:
    """A factor for every wave; they are reckoned on the CPU, so that they are the same for any device."""
    filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(matrix).mul_(factors.to(matrix.device)), s=matrix.shape)
    return filtered
