"""Add up the two thin matrices of adapters, each by itself.

An adapter's change is a product B A. The sum of such products needs the directions of all of them (`linear` and
`task-arithmetic` make it, exactly, or cut to a rank). Adding up all B and all A first, and multiplying then, keeps the
rank of one adapter, but is something else: every B meets every A, and what two adapters have to do with each other
is chance. Two recipes of this kind are in use, and this is for those who want their results; it is for adapters by
themselves only, and all must have one rank.

`form: lorahub` multiplies both matrices of an adapter by its weight: an adapter's own change counts by the square of
it. `form: peft` multiplies both by the root, so that it counts by the weight: what PEFT's `add_weighted_adapter` does
under `combination_type: linear`.

Reference: Huang et al., LoraHub, COLM 2024, https://arxiv.org/abs/2307.13269, section 3.3; PEFT's
`add_weighted_adapter`.
Differs from the paper: weights are given, not searched for; where scales (alpha / rank) differ, which LoraHub does not
speak of, the root of each goes into both matrices. PEFT's sign of a negative weight is on A.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import (
    Factored,
    Field,
    Finite,
    Method,
    Params,
    PerModel,
    Stats,
    TensorGroup,
    TensorMethod,
)

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal["lorahub", "peft"]


class _Halves(TensorMethod):
    """What is done to the two matrices of adapters; what they hold in full is added up as task vectors are."""

    weight: PerModel[Finite] = 1.0
    form: Form = "peft"
    needs_base: ClassVar = "optional"
    granularity: ClassVar = "element"
    buffers: ClassVar = 1

    def in_factors(self, name: str, shape: tuple[int, ...]) -> Factored:
        return "halves"

    def treatment(self, name: str, shape: tuple[int, ...]) -> str:
        return "factor-sum"

    def half_coefficients(self, scales: Sequence[float], p: Params) -> Sequence[tuple[float, float]]:
        return [self._coefficients(weight, scale) for weight, scale in zip(p.weight, scales, strict=True)]

    def _coefficients(self, weight: float, scale: float) -> tuple[float, float]:
        if not scale:
            return 0.0, 0.0
        root = math.sqrt(abs(scale))
        if self.form == "lorahub":
            return weight * root / scale, weight * math.copysign(root, scale)
        both = math.sqrt(abs(weight)) * root
        return both / scale, math.copysign(both, weight * scale)

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        total = group.scratch("total").zero_()
        for weight, delta in zip(p.weight, group.models if group.base is None else group.deltas, strict=True):
            total.add_(delta, alpha=weight)
        return total if group.base is None else group.base.add_(total)


class FactorSum(Method):
    """`sum(c_i B_i) sum(c_i A_i)`, c_i the weight of an adapter, or the root of it"""

    method: Literal["factor-sum"] = "factor-sum"
    weight: PerModel[Finite] = Field(1.0, description="weight of each adapter")
    form: Form = Field("peft", description="what B and A are multiplied by: the root of the weight, or the weight")
    needs_base: ClassVar = "optional"
    needs_adapters: ClassVar = "it adds up the thin matrices that adapters have, and whole weights have none"

    def kernel(self) -> TensorMethod:
        return _Halves(weight=self.weight, form=self.form)

    def needs_weights(self) -> str | None:
        return None
