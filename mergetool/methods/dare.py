"""Drop random entries of task vectors, rescale the rest, merge.

Most of what fine-tuning changes is redundant: entries of a task vector can be dropped at random, and the rest scaled
up so that its expectation stays, with little loss. Sparse task vectors then overlap less. `dare-linear` adds them up;
`dare-ties` lets them vote on signs first and adds up those that agree.

Which entries are dropped depends on the seed, the tensor's name, the model's name and the place of the entry, and on
nothing else: the same on any machine, for any number of workers, and after a resume.

Reference: Yu et al., Language models are super Mario, ICML 2024, https://arxiv.org/abs/2311.03099, section 3.
Differs from the paper: `density` is the share that is kept (the paper's p is the share dropped); `rescale: l1` restores
each task vector's L1 norm instead, as mergekit does; draws have a resolution of 2^-16, and the factor matches it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import (
    Field,
    Finite,
    Fraction,
    Params,
    PerModel,
    Scheduled,
    StatisticsPass,
    Stats,
    TensorGroup,
    TensorMethod,
    cancel,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Norms(StatisticsPass):
    """L1 norm of every task vector, before and after dropping, in float64."""

    def observe(self, groups: Iterable[TensorGroup], p: Params) -> "Tensor":
        import torch

        total = torch.zeros(2, len(p.density), dtype=torch.float64)
        for group in groups:
            deltas = [delta.abs_() for delta in group.deltas]
            whole = [delta.sum(dtype=torch.float64) for delta in deltas]
            given = zip(group.names, deltas, p.density, strict=True)
            kept = [_drop(group, *each).sum(dtype=torch.float64) for each in given]
            total += torch.stack((*whole, *kept)).view_as(total).to("cpu")  # added up here, wherever the slice is
        return total

    def conclude(self, total: "Tensor") -> Stats:
        whole, kept = total.tolist()
        return {"factor": tuple(w / k if k > 0.0 else 1.0 for w, k in zip(whole, kept, strict=True))}


class _Dare(TensorMethod):
    """What both members of the family share: fields, dropping, rescaling."""

    density: PerModel[Fraction] = Field(0.5, description="share of each task vector that is kept")
    weight: PerModel[Finite] = Field(1.0, description="weight of each task vector")
    scale: Scheduled[Finite] = Field(1.0, description="factor on the merged task vector")
    rescale: Literal["1/p", "l1", "none"] = Field(
        "1/p", description="after dropping: divide by the share kept, restore the L1 norm, or leave as it is"
    )
    normalize: bool = Field(False, strict=True, description="divide by the sum of the weights")
    needs_base: ClassVar = "required"
    granularity: ClassVar = "element"
    buffers: ClassVar = 6
    pass_depends_on: ClassVar = ("density",)
    neutral: ClassVar = {"density": 1.0, "normalize": True}
    exempt: ClassVar = {
        "seed-free": "draws which entries are kept",
        "tied": "draws are keyed by the tensor's name, so two stored copies of a tensor get two draws",
    }

    @property
    def needs_float64(self) -> bool:
        return self.rescale == "l1"

    def statistics_pass(self, p: Params, num_elements: int, bits: int) -> StatisticsPass | None:
        return _Norms() if self.rescale == "l1" and any(density < 1.0 for density in p.density) else None

    def problem(self, p: Params) -> str | None:
        if self.normalize and cancel(p.weight):
            return f"the weights {p.weight} add up to 0, so they cannot be normalised"
        return None

    def dropped(self, group: TensorGroup, p: Params, stats: Stats) -> "list[Tensor]":
        """Every task vector with entries dropped and the rest rescaled."""
        from mergetool.kernels.rng import resolved

        factors = stats["factor"] if stats else tuple(1.0 / resolved(d) for d in p.density)
        for name, delta, density in zip(group.names, group.deltas, p.density, strict=True):
            _drop(group, name, delta, density)
        if self.rescale != "none":
            for delta, factor in zip(group.deltas, factors, strict=True):
                delta.mul_(factor)
        return group.deltas


class DareLinear(_Dare):
    """`base + scale * sum(w_i drop(x_i - base))`"""

    method: Literal["dare-linear"] = "dare-linear"

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        total = group.scratch("total").zero_()
        for weight, delta in zip(p.weight, self.dropped(group, p, stats), strict=True):
            total.add_(delta, alpha=weight)
        assert group.base is not None
        return group.base.add_(total, alpha=p.scale / sum(p.weight) if self.normalize else p.scale)


class DareTies(_Dare):
    """`base + scale * sum of the dropped task vectors that agree with the elected sign`"""

    method: Literal["dare-ties"] = "dare-ties"
    normalize: bool = Field(False, strict=True, description="divide by the weights that agree (mean); false: sum")

    def problem(self, p: Params) -> str | None:
        return None

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        from mergetool.kernels.consensus import agreeing_sum_

        deltas = self.dropped(group, p, stats)
        merged = agreeing_sum_(deltas, p.weight, normalize=self.normalize, scratch=group.scratch)
        assert group.base is not None
        return group.base.add_(merged, alpha=p.scale)


def _drop(group: TensorGroup, name: str, delta: "Tensor", density: float) -> "Tensor":
    """Zero, in place, the entries of one model's task vector that are to go."""
    from mergetool.kernels.rng import keep_mask, stream_key

    if density == 1.0:
        return delta
    key = stream_key(group.seed, group.name, name, "dare")
    mask = group.scratch("sign")  # where a vote keeps signs, once all masks are done with: one temporary less
    return delta.mul_(keep_mask(key, group.start, density, mask, group.scratch))
