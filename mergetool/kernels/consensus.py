"""Trim, elect, average: the arithmetic of sign consensus, in operations that stay in cache and vectorise.

There are no boolean masks here. A trimmed vector is zero where it was dropped; a value that agrees with the elected
sign is positive once multiplied by it; clamping then leaves the agreeing magnitudes, and their sign counts them.

Reference: Yadav et al., TIES-Merging, NeurIPS 2023, https://arxiv.org/abs/2306.01708, section 3.
"""

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor


def keep_largest_(x: Tensor, threshold: float, *, inclusive: bool) -> Tensor:
    """Zero, in place, every entry of |x| below `threshold` (with `inclusive=False`, also those equal to it)."""
    threshold = _just_below(threshold, x.dtype) if inclusive else threshold
    if inclusive and threshold <= 0.0:  # everything that is not zero stays
        return x
    torch.ops.aten.hardshrink.out(x, threshold, out=x)
    return x


def drop_larger_(x: Tensor, threshold: float, *, inclusive: bool, scratch: Callable[[str], Tensor]) -> Tensor:
    """Zero, in place, every entry of |x| above `threshold` (with `inclusive`, also those equal to it)."""
    if threshold == 0.0:  # hardshrink keeps what is above it, and zero is never above
        return x.zero_()
    large = scratch("sign")
    torch.ops.aten.hardshrink.out(x, _just_below(threshold, x.dtype) if inclusive else threshold, out=large)
    return x.sub_(large)


def _just_below(threshold: float, dtype: torch.dtype) -> float:
    number = np.float32 if dtype == torch.float32 else np.float64
    return float(np.nextafter(number(threshold), number(0)))


def agreeing_sum_(
    values: Sequence[Tensor],
    weights: Sequence[float],
    *,
    normalize: bool,
    scratch: Callable[[str, torch.dtype], Tensor],
) -> Tensor:
    """Weighted sum (or mean) of the values whose sign is the sign of the weighted total. Overwrites `values`.

    The elected sign of an entry is that of `sum(w_i x_i)`; where the sum is exactly 0 there is no majority and the
    result is 0. With `normalize`, the sum is divided by the weights of the models that agree; where those cancel
    exactly it is not divided. `scratch(name, dtype)` gives temporaries like a value; the result is one of them.
    """
    if len(set(weights)) == 1 and weights[0] != 1.0 and weights[0] != 0.0:  # a common factor can wait, or cancels
        merged = agreeing_sum_(values, [1.0] * len(values), normalize=normalize, scratch=scratch)
        return merged if normalize else merged.mul_(weights[0])
    dtype = values[0].dtype
    sign, total = scratch("sign", dtype), scratch("total", dtype)
    for index, (value, weight) in enumerate(zip(values, weights, strict=True)):
        if weight != 1.0:
            value.mul_(weight)
        sign.copy_(value) if index == 0 else sign.add_(value)
    sign.sign_()
    count = scratch("count", dtype).zero_() if normalize else None
    total.zero_()
    for value, weight in zip(values, weights, strict=True):
        total.add_(value.mul_(sign).clamp_(min=0.0))
        if count is not None:
            count.add_(value.sign_(), alpha=weight)
    total.mul_(sign)
    if count is not None:
        total.div_(_never_zero_(count, weights))
    return total


def agreeing_mean_(values: Sequence[Tensor], weights: Sequence[float], *, scratch: Callable[[str], Tensor]) -> Tensor:
    """Mean, with weights from 0 up, of the values that have the sign of their plain sum. Overwrites `values`.

    Weights have no part in the vote. Where the sum is exactly 0, or no weight is left, the result is 0. It is one of
    the temporaries, which `scratch(name)` gives.
    """
    sign = scratch("sign").copy_(values[0])
    for value in values[1:]:
        sign.add_(value)
    sign.sign_()
    total, count = scratch("total").zero_(), scratch("count").zero_()
    for value, weight in zip(values, weights, strict=True):
        total.add_(value.mul_(sign).clamp_(min=0.0), alpha=weight)
        count.add_(value.sign_(), alpha=weight)
    return total.mul_(sign).div_(count.add_(torch.eq(count, 0.0, out=sign)))  # 1 where nothing is counted


def kept_mean(values: Sequence[Tensor], weights: Sequence[float], *, scratch: Callable[[str], Tensor]) -> Tensor:
    """Weighted mean of the values that are not zero; 0 where all are. It is one of the temporaries."""
    total, count, kept = scratch("total").zero_(), scratch("count").zero_(), scratch("sign")
    for value, weight in zip(values, weights, strict=True):
        total.add_(value, alpha=weight)
        count.add_(torch.ne(value, 0.0, out=kept), alpha=weight)
    return total.div_(_never_zero_(count, weights))


def agreed_sum(
    values: Sequence[Tensor], thresholds: Sequence[float], agreeing: int, *, scratch: Callable[[str], Tensor]
) -> Tensor:
    """Sum of the values, where it matters to at least so many of them; else 0. It is one of the temporaries.

    It matters to one that is larger than its threshold times what the others add up to. Overwrites `values`.
    """
    total, count, others = scratch("total").zero_(), scratch("count").zero_(), scratch("sign")
    for value in values:
        total.add_(value)
    for value, threshold in zip(values, thresholds, strict=True):
        torch.sub(total, value, out=others).abs_().mul_(threshold)
        count.add_(torch.gt(value.abs_(), others, out=others))
    return total.mul_(torch.ge(count, agreeing, out=count))


def spread(values: Sequence[Tensor], *, scratch: Callable[[str], Tensor]) -> Tensor:
    """Of every entry the variance over the values, but for a factor: the sum of squared differences of all pairs.

    It is one of the temporaries.
    """
    total, difference = scratch("total").zero_(), scratch("sign")
    for one, other in combinations(values, 2):
        torch.sub(one, other, out=difference)
        total.addcmul_(difference, difference)
    return total


def largest_(values: Sequence[Tensor], *, scratch: Callable[[str, torch.dtype], Tensor]) -> Tensor:
    """Of every entry the value of largest magnitude, of equal ones the last. It is the first of `values`.

    Magnitudes are compared as whole numbers, in whose order NaN is the largest: none is lost.
    """
    whole = torch.int32 if values[0].dtype == torch.float32 else torch.int64
    best, most = values[0], torch.iinfo(whole).max
    largest, size = scratch("largest", whole), scratch("size", whole)
    torch.bitwise_and(best.view(whole), most, out=largest)
    for value in values[1:]:
        torch.bitwise_and(value.view(whole), most, out=size)
        torch.where(size >= largest, value, best, out=best)
        torch.maximum(largest, size, out=largest)
    return best


def _never_zero_(count: Tensor, weights: Sequence[float]) -> Tensor:
    """Where no weight is counted there is nothing to divide; any divisor but 0 will do."""
    if all(weight > 0 for weight in weights):
        return count.clamp_(min=min(weights) / 2)
    return count.masked_fill_(count == 0, 1.0)


def keep_elected_(values: Sequence[Tensor], density: float) -> None:
    """Keep of each value its largest entries, so many, and of those the ones that have the sign of the sum."""
    for value in values:
        keep_highest_(value, value.abs(), density)
    sign = sum(value.double() for value in values[1:]) + values[0].double()
    for value in values:
        value.mul_(torch.sign(value) == torch.sign(sign))


def keep_highest_(x: Tensor, scores: Tensor, density: float) -> None:
    """Zero, in place, all entries but that share whose scores are highest; those equal to the last one stay, too."""
    count = max(1, int(density * x.numel()))
    if count < x.numel():
        threshold = torch.kthvalue(scores.reshape(-1), x.numel() - count + 1).values
        x.mul_(scores >= threshold)
