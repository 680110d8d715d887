"""One change for many experts, and which of its entries are each one's own: EMR's election, TALL masks, and their bits.

elected    per entry the sign of the sum of all changes, and the largest size among those that have it
in step    an expert's mask of an elected change: where its own has the same sign
its own    an expert's mask of the sum of all changes: where its own exceeds `margin` times what the others add to it

Masks are kept as bits, eight entries in a byte, the first one in the lowest bit.

Reference: Huang et al., EMR-Merging, NeurIPS 2024, https://arxiv.org/abs/2405.17461; Wang et al., Localizing Task
Information for Improved Model Merging and Compression, ICML 2024, https://arxiv.org/abs/2405.07813.
Differs from the paper: nothing (where changes sum up to 0, minus is elected, as in EMR's code).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def elected(changes: Sequence[Tensor]) -> Tensor:
    """The change that EMR elects from those of all experts, in their dtype."""
    sign = torch.where(_total(changes) > 0, 1.0, -1.0).to(changes[0].dtype)
    largest = torch.zeros_like(sign)
    for change in changes:
        torch.maximum(largest, change * sign, out=largest)
    return largest.mul_(sign)


def summed(changes: Sequence[Tensor]) -> Tensor:
    """The sum of all changes, added up in float64."""
    return _total(changes).to(changes[0].dtype)


def _total(changes: Sequence[Tensor]) -> Tensor:
    total = changes[0].to(torch.float64, copy=True)
    for change in changes[1:]:
        total += change
    return total


def in_step(change: Tensor, unified: Tensor) -> Tensor:
    """Where a change has the sign of the elected one."""
    return change.sign() * unified.sign() > 0


def its_own(change: Tensor, total: Tensor, margin: float) -> Tensor:
    """Where a change exceeds `margin` times what others add to it; nowhere that it is 0."""
    return change.abs() > margin * (total - change).abs()


def packed(mask: Tensor) -> Tensor:
    """Bits of a mask of any shape, (entries / 8 rounded up,) uint8."""
    flat = mask.reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=flat.device)
    return (flat << places).sum(1, dtype=torch.uint8)


def unpacked(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mask that was packed."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flat = (bits.unsqueeze(1) >> places & 1).view(-1)
    return flat[: math.prod(shape)].view(shape).bool()
