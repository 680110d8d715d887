"""Average task vectors where several models changed a value, and keep a change in full where only one did.

Models trained by reinforcement change few parameters, each other ones. An average over all models would shrink what
only one has learnt. So changes are counted entry by entry: one that only one model has is kept in full, one that
several have is averaged over these. `ramplus-tl` makes up for what a model loses in averages by enlarging what is its
own, by up to `r * alpha`.

Reference: Reinforced Agent Merging, 2026, https://arxiv.org/abs/2601.13572; defaults are mergekit's.
Differs from the paper: shares of common and own changes are those of each tensor, not of the whole model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import (
    Field,
    Finite,
    Params,
    Positive,
    Scheduled,
    StatisticsPass,
    Stats,
    TensorGroup,
    TensorMethod,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Shares(StatisticsPass):
    """How many changes each model has in common with others, and how many alone: (2, N)."""

    r: float
    alpha: float

    def observe(self, groups: Iterable[TensorGroup], p: Params) -> "Tensor":
        import torch

        from mergetool.kernels.masks import count_nonzero, mask_equal

        parts = []
        for group in groups:
            changed, count = _changes(group, p.epsilon)
            own = mask_equal(count, 1.0, group.scratch)
            counts = [count_nonzero(delta, mask) for mask in (None, own) for delta in changed]
            every, alone = torch.stack(counts).to("cpu").view(2, -1)
            parts.append(torch.stack([every - alone, alone]))
        return torch.stack(parts).sum(0)

    def conclude(self, total: "Tensor") -> Stats:
        shared, alone = total.tolist()
        ratios = (s / a if a else 0.0 for s, a in zip(shared, alone, strict=True))
        return {"factor": tuple(1.0 + self.r * min(max(ratio, 0.0), self.alpha) for ratio in ratios)}


class _Ram(TensorMethod):
    """What both members of the family share."""

    epsilon: Scheduled[Positive] = Field(1e-5, description="what is no larger is no change")
    needs_base: ClassVar = "required"
    granularity: ClassVar = "element"
    buffers: ClassVar = 5
    exempt: ClassVar = {"units": "changes are told from rounding by a size of their own"}

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        import torch

        changed, count = _changes(group, p.epsilon)
        total, own = group.scratch("total").zero_(), group.scratch("own").zero_()
        for delta, factor in zip(changed, stats.get("factor") or (1.0,) * len(changed), strict=True):
            total.add_(delta)
            if factor != 1.0:
                own.add_(delta, alpha=factor - 1.0)
        total.div_(count.clamp_(min=1.0))
        assert group.base is not None
        return group.base.add_(total).add_(own.mul_(torch.eq(count, 1.0, out=group.scratch("sign"))))


class Ram(_Ram):
    """`base + sum(changes) / number of models that changed the entry`"""

    method: Literal["ram"] = "ram"


class RamplusTl(_Ram):
    """`base + sum(changes) / number of models that changed the entry`, what only one changed enlarged"""

    method: Literal["ramplus-tl"] = "ramplus-tl"
    r: Scheduled[Finite] = Field(0.1, description="how much of the ratio is added to the factor 1")
    alpha: Scheduled[Positive] = Field(0.2, description="most that the ratio of common to own changes may be")

    def statistics_pass(self, p: Params, num_elements: int, bits: int) -> StatisticsPass | None:
        return _Shares(p.r, p.alpha)


def _changes(group: TensorGroup, epsilon: float) -> "tuple[list[Tensor], Tensor]":
    """Task vectors without what is no change, and by how many models each entry was changed."""
    import torch

    count, changed = group.scratch("count").zero_(), group.scratch("sign")
    for delta in group.deltas:
        torch.ops.aten.hardshrink.out(delta, epsilon, out=delta)
        count.add_(torch.ne(delta, 0.0, out=changed))
    return group.deltas, count
