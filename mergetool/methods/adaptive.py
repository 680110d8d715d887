"""Keep of each task vector what stands out of it, however much that is: a threshold from its own distribution.

A fixed share of a task vector is too much where few changes matter, and too little where many do. Here an entry stays
if its change is larger than the mean of all changes by `deviations` standard deviations. Where changes hardly differ
(by less than a thousandth of their mean) all of them stay. What is left is added up.

Reference: Yang et al., Model Merging in LLMs, MLLMs, and Beyond, 2024, https://arxiv.org/abs/2408.07666, section 2
(thresholds by magnitude); the rule with mean and deviation is the usual one for outliers.
Differs from the paper: no single paper has it; means and deviations are those of magnitudes, of a tensor or of the
whole model (`scope`). `arcee-fusion` is the same idea with quartiles, for one model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Field, Finite, Params, PerModel, StatisticsPass, Stats, TensorGroup
from mergetool.methods.families.scope import ScopedMethod
from mergetool.methods.families.sparse import ThinnedMethod

if TYPE_CHECKING:
    from torch import Tensor

_EQUAL = 1e-3
"""Relative spread below which changes do not differ: squares are rounded to float32."""


@dataclass(frozen=True)
class _Moments(StatisticsPass):
    """Sums of magnitudes, and of their squares, of every task vector, in float64."""

    deviations: tuple[float, ...]
    num_elements: int
    then: ThinnedMethod

    def observe(self, groups: Iterable[TensorGroup], p: Params) -> "Tensor":
        import torch

        from mergetool.kernels.sums import wide_sum

        total = torch.zeros(2, len(self.deviations), dtype=torch.float64)
        for group in groups:
            sums = [wide_sum(delta.abs_(), group.scratch) for delta in group.deltas]
            squares = [wide_sum(delta.square_(), group.scratch) for delta in group.deltas]
            total += torch.stack((*sums, *squares)).view_as(total).to("cpu")
        return total

    def conclude(self, total: "Tensor") -> StatisticsPass | Stats:
        means, squares = (total / self.num_elements).unbind()
        spread = (squares - means.square()).clamp(min=0.0).sqrt()
        found = zip(means.tolist(), spread.tolist(), self.deviations, strict=True)
        return self.then.norms({"threshold": tuple(m + c * s if s > _EQUAL * m else 0.0 for m, s, c in found)})


class Adaptive(ThinnedMethod, ScopedMethod):
    """`base + scale * sum(w_i (x_i - base), where it is larger than its mean and some standard deviations)`"""

    method: Literal["adaptive"] = "adaptive"
    deviations: PerModel[Finite] = Field(
        1.0, description="standard deviations above the mean of all magnitudes that a change must be larger than"
    )
    scope: Literal["tensor", "model"] = Field("tensor", description="what means and deviations are of")
    neutral: ClassVar = {"deviations": -1e9, "normalize": True}
    pass_depends_on: ClassVar = ("deviations",)
    exempt: ClassVar = {"independent scope=model": ScopedMethod.alike["independent"]}

    @property
    def needs_float64(self) -> bool:
        return True

    def statistics_pass(self, p: Params, num_elements: int, bits: int) -> StatisticsPass | None:
        return _Moments(p.deviations, num_elements, self) if num_elements else None

    def thin(self, group: TensorGroup, p: Params, stats: Stats) -> None:
        from mergetool.kernels.consensus import keep_largest_

        for delta, threshold in zip(group.deltas, stats.get("threshold", ()), strict=bool(stats)):
            if threshold > 0.0:
                keep_largest_(delta, threshold, inclusive=False)
