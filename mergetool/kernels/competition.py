"""Entries of task vectors that compete: with the others of their own vector by size, and with other vectors by sign.

The score of an entry is `exp(n size^2 - n) tanh(x total)`: size is where its magnitude lies between two clips, 0 to 1,
n how many vectors there are, total the sum of all of them. (The factor exp(-n), which no ranking sees, keeps the score
of many vectors within float32.)

Reference: Du et al., Parameter Competition Balancing, NeurIPS 2024, https://arxiv.org/abs/2410.02396, section 3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Scratch = Callable[[str], Tensor]
_ITSELF = 2.0**-13
"""The hyperbolic tangent of a float32 below this is the same float32."""


@dataclass(frozen=True)
class Clip:
    """Magnitudes of one vector below which, and above which, they do not differ."""

    low: float
    high: float

    def sizes(self, x: Tensor, out: Tensor) -> Tensor:
        """|x|, clipped."""
        return torch.abs(x, out=out).clamp_(self.low, self.high)


def total_of(values: Sequence[Tensor], scratch: Scratch) -> Tensor:
    """The sum of all, which every score needs."""
    total = scratch("total").copy_(values[0])
    for value in values[1:]:
        total.add_(value)
    return total


def score(x: Tensor, sizes: Tensor, total: Tensor, clip: Clip, count: int, scratch: Scratch) -> Tensor:
    """The scores of one of `count` vectors, whose sizes are known. They are there until the next ones are asked for."""
    within = torch.sub(sizes, clip.low, out=scratch("score")).div_((clip.high - clip.low) or 1.0)
    between = _tanh_(torch.mul(x, total, out=scratch("between")))
    return within.square_().sub_(1.0).mul_(count).exp_().mul_(between)


def score_(values: Sequence[Tensor], clips: Sequence[Clip], scratch: Scratch) -> None:
    """Put the scores of all vectors in their place."""
    total = total_of(values, scratch)
    for value, clip in zip(values, clips, strict=True):
        value.copy_(score(value, clip.sizes(value, scratch("sizes")), total, clip, len(clips), scratch))


def _tanh_(x: Tensor) -> Tensor:
    """The hyperbolic tangent, in place; left out where it is each number itself, as of products of small changes."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and len(x):
        low, high = torch.aminmax(x)
        if float(low) > -_ITSELF and float(high) < _ITSELF:
            return x
    return x.tanh_()


def balanced(
    values: Sequence[Tensor],
    weights: Sequence[float],
    clips: Sequence[Clip],
    spans: Sequence[tuple[float, float]],
    scratch: Scratch,
) -> Tensor:
    """Sum of the weighted values, clipped, each by its score; divided by the sum of scores. 0 where nobody competes.

    Of a vector's scores, what lies between the two of its span counts from 0 to 1, and what is below not at all.
    """
    total = total_of(values, scratch)
    merged, scores = scratch("merged").zero_(), scratch("scores").zero_()
    for value, weight, clip, (cut, top) in zip(values, weights, clips, spans, strict=True):
        sizes = clip.sizes(value, scratch("sizes"))
        share = score(value, sizes, total, clip, len(values), scratch)
        share = torch.ge(share, cut, out=share) if top == cut else share.sub_(cut).div_(top - cut).clamp_(0.0, 1.0)
        scores.add_(share)
        merged.addcmul_(sizes.mul_(value.sign_()), share, value=weight)
    merged.div_(scores.clamp_(min=1e-12))
    return merged.add_(total, alpha=0.0)  # what is not finite has been clipped: not lost
