"""The largest few of every block of neighbouring entries: n:m sparsity."""

import numpy as np
import torch
from torch import Tensor


def keep_in_blocks_(x: Tensor, free: Tensor, size: int, density: float) -> None:
    """Zero all of x (rows, n) but the largest free entries of every block, which are not free any more.

    A block is `size` neighbours within a row; the last of a row may be shorter. `density` of its length are kept, at
    least one, as far as entries are `free` (booleans). Of equal magnitudes the first are kept. What is not finite is
    never dropped, but becomes NaN.
    """
    whole = x.shape[1] // size * size
    for begin, end, length in ((0, whole, size), (whole, x.shape[1], x.shape[1] - whole)):
        if end > begin:
            part, left = x[:, begin:end], free[:, begin:end]
            count = max(1, round(density * length))
            kept = _largest(part.reshape(-1, length), left.reshape(-1, length), count).view(part.shape)
            part.mul_(kept)
            left.logical_and_(kept.logical_not_())


def _largest(x: Tensor, free: Tensor, count: int) -> Tensor:
    """Where one of the `count` largest free entries of a row is (rows, n)."""
    whole = torch.int32 if x.dtype == torch.float32 else torch.int64
    ranks = (x.view(whole) & torch.iinfo(whole).max).masked_fill_(~free, -1)  # ordered as magnitudes are, NaN above all
    threshold = _kth_largest(ranks, count)
    if x.device.type != "cpu":  # it would be waited for to hear which rows have too many
        return _exactly(count, ranks, threshold).logical_and_(free)
    kept = (ranks >= threshold).logical_and_(free)
    counts = kept.view(torch.uint8).sum(1, dtype=torch.int32)  # ten times the speed of counting booleans
    crowded = (counts > count).nonzero().view(-1)
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
