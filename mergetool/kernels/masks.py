"""Dropping and counting entries without a branch for each: where entries come in no order, one is a coin toss, and
several times as dear as the arithmetic around it.

A mask is a whole number of the width of the floats, all ones where an entry stays and zero where it goes.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Scratch = Callable[[str, torch.dtype], Tensor]


def mask_below(scores: Tensor, threshold: float, scratch: Scratch) -> Tensor:
    """The mask that drops what has a score below `threshold`."""
    mask = scratch("mask", _whole(scores.dtype))
    return torch.lt(scores, threshold, out=mask).sub_(1)


def mask_equal(values: Tensor, value: float, scratch: Scratch) -> Tensor:
    """The mask that keeps what equals `value`."""
    mask = scratch("mask", _whole(values.dtype))
    return torch.eq(values, value, out=mask).neg_()


def apply_(x: Tensor, mask: Tensor) -> Tensor:
    """Zero, in place, what a mask drops: whatever it is, NaN too."""
    x.view(mask.dtype).bitwise_and_(mask)
    return x


def count_nonzero(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """How many entries are not zero, of those that a mask keeps (no axes, int64, where `x` is); -0.0 is not."""
    bits = x.view(_whole(x.dtype))
    if mask is not None:
        bits = bits & mask
    if bits.device.type != "cpu":
        return torch.count_nonzero(bits)
    return torch.tensor(np.count_nonzero(bits.numpy()))  # several times as fast as torch


def packed(choice: Tensor) -> Tensor:
    """Zeros and ones (any whole numbers, on the CPU) as bits."""
    return torch.from_numpy(np.packbits(choice.reshape(-1).numpy().astype(np.bool_)))


def unpack(bits: Tensor, out: Tensor) -> Tensor:
    """Fill `out` with the zeros and ones that were packed."""
    return out.view(-1).copy_(torch.from_numpy(np.unpackbits(bits.numpy(), count=out.numel()))).view_as(out)


def _whole(dtype: torch.dtype) -> torch.dtype:
    """Whole numbers as wide as these floats."""
    return torch.int32 if dtype == torch.float32 else torch.int64
