"""Slow waves taken out of a matrix: a filter on its two-dimensional Fourier transform."""

import torch
from torch import Tensor


def high_pass(matrix: Tensor, cutoff: float) -> Tensor:
    """Without the waves (m, n) whose frequency is below `cutoff`: 0 keeps all, 1 all but the very fastest.

    A wave's frequency is the root mean square of those along both axes, each from 0 (constant) to 1 (the next entry has
    the opposite sign).
    """
    rows, columns = _axes(matrix)
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
    places = torch.arange(rows, device=matrix.device)[:, None], torch.arange(columns, device=matrix.device)
    squares = (places[0] - rows // 2).square() + (places[1] - columns // 2).square()
    kept = squares <= (radius * min(rows, columns)) ** 2
    mirrored = kept.roll((-1, -1), (0, 1)).flip(0, 1)  # a real matrix has every wave twice, and its real part is wanted
    return _filtered(matrix, (kept.to(matrix.dtype) + mirrored.to(matrix.dtype))[:, : columns // 2 + 1] / 2)


def _axes(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Frequencies along both axes, of a transform of which one half is stored; at most 1/2."""
    like = {"device": matrix.device, "dtype": torch.float64 if matrix.device.type == "cpu" else torch.float32}
    return torch.fft.fftfreq(matrix.shape[0], **like).abs(), torch.fft.rfftfreq(matrix.shape[1], **like)


def _filtered(matrix: Tensor, factors: Tensor) -> Tensor:
    return torch.fft.irfft2(torch.fft.rfft2(matrix).mul_(factors), s=matrix.shape)
