"""Merge where models differ: select the entries with the largest variance, weigh models by them, erase what disagrees.

Select: of the entries that differ between models, the `density` with the largest variance of the changes are selected.
Calculate: a model's weight is its share of the squared changes selected. Erase: what does not have the sign of the sum
of changes is left out, and the rest averaged with those weights. A tensor at a time, there is nothing else to set.

Reference: Wan et al., FuseChat: Knowledge Fusion of Chat Models, 2024, https://arxiv.org/abs/2408.07990, section 3.3.
`density` is the authors'.
Differs from the paper: the authors' code selects for the weights only, and merges all changes (`select: weights`). An
entry whose changes add up to exactly 0 keeps the base's value. `negligible` is mergekit's: its 1e-6 makes all weights
equal for most fine-tunes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import (
    Field,
    Fraction,
    Params,
    Positive,
    Scheduled,
    StatisticsPass,
    Stats,
    TensorGroup,
    TensorMethod,
)
from mergetool.methods.families.ranks import find

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Differing(StatisticsPass):
    """How many entries differ between models."""

    density: float
    negligible: float
    num_elements: int
    bits: int

    def observe(self, groups: Iterable[TensorGroup], p: Params) -> "Tensor":
        import torch

        from mergetool.kernels.masks import count_nonzero

        return torch.stack([count_nonzero(_variance(group, p)[0]) for group in groups]).sum(0, keepdim=True).to("cpu")

    def conclude(self, total: "Tensor") -> StatisticsPass | Stats:
        differing = int(total)
        if differing == 0:
            return {"threshold": (math.inf,)}
        rank = max(1, int(self.density * differing))
        then = partial(_Energies, self.negligible, self.num_elements)
        return find(_variance, [(0, rank)], self.num_elements, self.bits, then)


@dataclass(frozen=True)
class _Energies(StatisticsPass):
    """Sum of the squares of every task vector, over the entries selected, in float64."""

    negligible: float
    num_elements: int
    known: Stats

    def observe(self, groups: Iterable[TensorGroup], p: Params) -> "Tensor":
        import torch

        from mergetool.kernels.sums import squared_norms

        parts = []
        for group in groups:
            _select(group, p, self.known)
            parts.append(squared_norms(group.deltas, group.scratch("total"), group.scratch))
        return torch.stack(parts).sum(0)

    def conclude(self, total: "Tensor") -> Stats:
        energy = float(total.sum())
        if energy == 0.0 or energy / self.num_elements < self.negligible:
            return self.known
        return {**self.known, "weight": tuple((total / energy).tolist())}


class Sce(TensorMethod):
    """`base + mean of the selected changes that agree with their sum, each model weighted by its squared changes`"""

    method: Literal["sce"] = "sce"
    density: Scheduled[Fraction] = Field(0.1, description="share, of the entries that differ, that is selected")
    select: Literal["delta", "weights"] = Field(
        "delta", description="merge only what is selected, or use it for the weights and merge everything"
    )
    negligible: Positive = Field(
        0.0, description="mean of squared changes, summed over models, below which all models weigh the same"
    )
    needs_base: ClassVar = "required"
    granularity: ClassVar = "element"
    buffers: ClassVar = 6
    neutral: ClassVar = {"density": 1.0}

    @property
    def needs_float64(self) -> bool:
        return True

    def statistics_pass(self, p: Params, num_elements: int, bits: int) -> StatisticsPass | None:
        if num_elements == 0:
            return None
        if p.density == 1.0:
            return _Energies(self.negligible, num_elements, {})
        return _Differing(p.density, self.negligible, num_elements, bits)

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        from mergetool.kernels.consensus import agreeing_mean_

        if self.select == "delta":
            _select(group, p, stats)
        count = len(group.deltas)
        merged = agreeing_mean_(group.deltas, stats.get("weight") or (1.0 / count,) * count, scratch=group.scratch)
        assert group.base is not None
        return group.base.add_(merged)


def _variance(group: TensorGroup, p: Params) -> "Sequence[Tensor]":
    from mergetool.kernels.consensus import spread

    return [spread(group.deltas, scratch=group.scratch)]


def _select(group: TensorGroup, p: Params, stats: Stats) -> None:
    """Zero, in place, the changes that are not selected."""
    from mergetool.kernels.masks import apply_, mask_below

    if "threshold" not in stats:
        return
    mask = mask_below(_variance(group, p)[0], stats["threshold"][0], group.scratch)
    for delta in group.deltas:
        apply_(delta, mask)
