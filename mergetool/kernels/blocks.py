"""The largest few of every block of neighbouring entries: n:m sparsity."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Scratch = Callable[[str, torch.dtype], Tensor]


def keep_in_blocks_(x: Tensor, taken: Tensor, size: int, density: float, scratch: Scratch) -> None:
    """Zero all of x (rows, n) but the largest entries of every block that are not taken, which are taken from now on.

    A block is `size` neighbours within a row; the last of a row may be shorter. `density` of its length are kept, at
    least one, as far as there are any. `taken` holds whole numbers as wide as the floats, -1 where an entry is taken,
    else 0. Of equal magnitudes the first are kept. What is not finite is never dropped, but becomes NaN.
    """
    ranks = torch.bitwise_and(x.view(taken.dtype), torch.iinfo(taken.dtype).max, out=scratch("ranks", taken.dtype))
    ranks.bitwise_or_(taken)  # ordered as magnitudes are, NaN above all; below them what is taken
    whole = x.shape[1] // size * size
    for begin, end, length in ((0, whole, size), (whole, x.shape[1], x.shape[1] - whole)):
        if end > begin:
            part = ranks[:, begin:end]
            kept = _largest(part.reshape(-1, length), max(1, round(density * length))).view(part.shape)
            x[:, begin:end].mul_(kept)
            taken[:, begin:end].sub_(kept.view(torch.int8))


def _largest(ranks: Tensor, count: int) -> Tensor:
    """Where the `count` largest of a row (rows, n) are, as far as they are not negative."""
    threshold = _kth_largest(ranks, count).clamp_(min=0)
    if ranks.device.type != "cpu":  # it would be waited for to hear which rows have too many
        return _exactly(count, ranks, threshold)
    kept = ranks >= threshold
    crowded = (kept.view(torch.uint8).sum(1, dtype=torch.int32) > count).nonzero().view(-1)
    if len(crowded):
        kept[crowded] = _exactly(count, ranks[crowded], threshold[crowded])
    return kept


def _exactly(count: int, ranks: Tensor, threshold: Tensor) -> Tensor:
    """Where what is above a row's threshold is, and of what equals it the first ones."""
    above, equal = ranks > threshold, ranks == threshold
    return above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True)))


def _kth_largest(ranks: Tensor, count: int) -> Tensor:
    """Of every row (rows, 1)."""
    place = ranks.shape[1] - count
    if ranks.device.type != "cpu":
        return ranks.topk(count, dim=1).values[:, -1:]
    return torch.from_numpy(np.partition(ranks.numpy(), place, axis=1)[:, place : place + 1])  # 15 times torch's speed
