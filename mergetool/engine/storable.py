"""Which values survive being stored."""

import math

import torch
from torch import Tensor

from mergetool.tensors.dtypes import DType, torch_dtype


def lost_in(values: Tensor, dtype: DType) -> Tensor:
    """Which values are not finite, or not once stored. (Casts to some 8-bit floats give the largest number instead.)"""
    stored = torch_dtype(dtype)
    half_a_step = torch.finfo(stored).eps * 2.0 ** (math.frexp(dtype.largest)[1] - 2)
    kept = torch.isfinite(values) & torch.isfinite(values.to(stored).to(values.dtype))
    return ~kept | (values.abs() > dtype.largest + half_a_step)


def within(values: Tensor, dtype: DType) -> bool:
    """Whether all values are finite and none is too large for `dtype`. One pass."""
    if values.numel() == 0:
        return True
    low, high = torch.aminmax(values)
    if values.device.type != "cpu":  # one number to wait for
        return float(torch.maximum(-low, high)) <= dtype.largest
    largest = max(-float(low), float(high))  # NaN compares false below
    return largest <= dtype.largest
