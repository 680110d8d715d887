"""What methods share that thin task vectors out before they bring them together, in steps that a method can replace.

Which entries go (`thin`); the factor on what is left (`rescale`, `own_factors`); what becomes of several task vectors
(`reduced`): a weighted sum, or, where a method lets its task vectors vote (`votes`), the sum or mean of what has the
elected sign (`mergetool.kernels.consensus`). Then `scale`, onto the base.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import (
    Field,
    Finite,
    Fraction,
    Granularity,
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

MEAN = "divide by the weights that agree (mean); false: sum"
"""What `normalize` means where task vectors vote."""


@dataclass(frozen=True)
class _Norms(StatisticsPass):
    """L1 norm of every task vector, before and after thinning out, in float64."""

    method: "ThinnedMethod"
    known: Stats

    def __call__(self, known: Stats) -> StatisticsPass | Stats:
        return _Norms(self.method, known) if self.method.rescale == "l1" else known

    def observe(self, groups: Iterable[TensorGroup], p: Params) -> "Tensor":
        import torch

        from mergetool.kernels.sums import wide_sum

        total = torch.zeros(2, len(p.weight), dtype=torch.float64)
        for group in groups:
            deltas = [delta.abs_() for delta in group.deltas]
            whole = [wide_sum(delta, group.scratch) for delta in deltas]
            self.method.thin(group, p, self.known)
            kept = [wide_sum(delta, group.scratch) for delta in deltas]
            total += torch.stack((*whole, *kept)).view_as(total).to("cpu")  # added up here, wherever the slice is
        return total

    def conclude(self, total: "Tensor") -> Stats:
        whole, kept = total.tolist()
        factors = tuple(w / k if k > 0.0 else 1.0 for w, k in zip(whole, kept, strict=True))
        return {**self.known, "factor": factors}


class ThinnedMethod(TensorMethod):
    """A method that drops entries of task vectors, rescales the rest, and adds up."""

    weight: PerModel[Finite] = Field(1.0, description="weight of each task vector")
    scale: Scheduled[Finite] = Field(1.0, description="factor on the merged task vector")
    rescale: Literal["l1", "none"] = Field(
        "none", description="after dropping: restore each task vector's L1 norm, or leave it as it is"
    )
    normalize: bool = Field(False, strict=True, description="divide by the sum of the weights")
    needs_base: ClassVar = "required"
    granularity: ClassVar[Granularity] = "element"
    buffers: ClassVar = 8
    votes: ClassVar[bool] = False
    """Whether only entries with the elected sign are added up."""

    @abstractmethod
    def thin(self, group: TensorGroup, p: Params, stats: Stats) -> None:
        """Zero, in place, the entries of the task vectors that are to go."""

    def own_factors(self, p: Params) -> Sequence[float]:
        """Factor on what is left of each task vector, where no L1 norm is to be restored."""
        return (1.0,) * len(p.weight)

    @property
    def needs_float64(self) -> bool:
        return self.rescale == "l1"

    def problem(self, p: Params) -> str | None:
        if self.normalize and not self.votes and cancel(p.weight):
            return f"the weights {p.weight} add up to 0, so they cannot be normalised"
        return None

    @property
    def norms(self) -> "_Norms":
        """What comes once it is known which entries go: called with that, the pass over norms where they are needed."""
        return _Norms(self, {})

    def change(self, group: TensorGroup, p: Params, stats: Stats) -> "tuple[Tensor, float]":
        self.thin(group, p, stats)
        for delta, factor in zip(group.deltas, stats.get("factor") or self.own_factors(p), strict=True):
            if factor != 1.0:
                delta.mul_(factor)
        return self.reduced(group, p)

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        merged, divisor = self.change(group, p, stats)
        assert group.base is not None
        return group.base.add_(merged, alpha=p.scale / divisor)

    def reduced(self, group: TensorGroup, p: Params) -> "tuple[Tensor, float]":
        """One vector of the task vectors left, and what it is still to be divided by."""
        from mergetool.kernels.consensus import agreeing_sum_

        if self.votes:
            return agreeing_sum_(group.deltas, p.weight, normalize=self.normalize, scratch=group.scratch), 1.0
        total = group.scratch("total").zero_()
        for weight, delta in zip(p.weight, group.deltas, strict=True):
            total.add_(delta, alpha=weight)
        return total, sum(p.weight) if self.normalize else 1.0


class _Density(TensorMethod):
    density: PerModel[Fraction] = Field(0.5, description="share of each task vector that is kept")


class SparseMethod(ThinnedMethod, _Density):
    """One of which a recipe says how much is kept."""

    neutral: ClassVar = {"density": 1.0, "normalize": True}

    def statistics_pass(self, p: Params, num_elements: int, bits: int) -> StatisticsPass | None:
        return _Norms(self, {}) if self.rescale == "l1" and any(density < 1.0 for density in p.density) else None
