"""Sums in float64 of numbers that are stored in float32.

torch's own (`sum(dtype=float64)`) widens everything first, into memory that it asks the system for at every call: on
slices, new pages cost as much as the sum. Here the room is given.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Scratch = Callable[[str, torch.dtype], Tensor]


def wide_sum(x: Tensor, scratch: Scratch) -> Tensor:
    """The sum of all entries (a tensor without axes, float64). `scratch(name, dtype)` is shaped like `x`."""
    return _widened(x, scratch).sum()


def squared_norms(vectors: Sequence[Tensor], room: Tensor, scratch: Scratch) -> Tensor:
    """Of each vector (N,), float64, on the CPU; `room` is like one of them, and overwritten."""
    return torch.stack([wide_sum(torch.mul(x, x, out=room), scratch) for x in vectors]).to("cpu")


def wide_row_sums(x: Tensor, scratch: Scratch) -> Tensor:
    """The sums along the last axis (..., 1), float64."""
    return _widened(x, scratch).sum(-1, keepdim=True)


def _widened(x: Tensor, scratch: Scratch) -> Tensor:
    return x if x.dtype == torch.float64 else scratch("wide", torch.float64).copy_(x)


def all_finite(x: Tensor) -> bool:
    """Whether no entry is infinite or not a number. A sum that is finite tells, sooner than a look at each."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())
