"""Spherical interpolation of two models or task vectors by weights, for whole tensors, rows or columns.

What `slerp` does for whole tensors, with two differences: there is no threshold below which angles do not count, and
with a `base` it is the task vectors that are turned into one another, whose angles are not almost zero as those of
the models are. `weight` says where on the way the result is: `t = w_2 / (w_1 + w_2)`.

Reference: Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985, section 3.3; the variants are those of
mergekit, whose method has this name.
Differs from the paper: coefficients come from directions and are applied to vectors of any length, as in `slerp`. Where
one vector is zero the straight line is taken, as it is where the two are parallel or opposite. A row is everything that
belongs to one index of the first axis, a column everything else; a tensor of one axis is one row, and one column.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import (
    Factored,
    Field,
    Finite,
    Granularity,
    Params,
    PerModel,
    StatisticsPass,
    Stats,
    TensorGroup,
    cancel,
)
from mergetool.methods.families.gram import Per, gram, vectors_of
from mergetool.methods.families.sphere import SphereMethod, shares

if TYPE_CHECKING:
    from torch import Tensor


class Nuslerp(SphereMethod):
    """`base + sin((1 - t) w) / sin w * (a - base) + sin(t w) / sin w * (b - base)`, w the angle between them"""

    method: Literal["nuslerp"] = "nuslerp"
    weight: PerModel[Finite] = Field(1.0, description="weight of each of the two models")
    per: Per = Field("tensor", description="one angle for a tensor, for each of its rows, or for each of its columns")
    min_models: ClassVar = 2
    max_models: ClassVar = 2

    def problem(self, p: Params) -> str | None:
        if cancel(p.weight):
            return f"the weights {p.weight} add up to 0, so there is no place between the models"
        return None

    def granularity_in(self, name: str, shape: tuple[int, ...]) -> Granularity:
        return "element" if self.per == "tensor" else "row" if self.per == "row" else "tensor"

    def in_factors(self, name: str, shape: tuple[int, ...]) -> Factored:
        return "cores" if self.per == "tensor" else "inputs" if self.per == "row" else "outputs"

    def statistics_pass(self, p: Params, num_elements: int, bits: int) -> StatisticsPass | None:
        return super().statistics_pass(p, num_elements, bits) if self.per == "tensor" else None

    def factors(self, gram: "Tensor", p: Params) -> "Tensor":
        from mergetool.kernels.sphere import slerp_factors

        return slerp_factors(gram[None], self.straight(p)[1])[0]

    def straight(self, p: Params) -> tuple[float, ...]:
        return shares(p.weight)

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        from mergetool.kernels.sphere import slerp_factors

        if self.per == "tensor":
            return super().merge(group, p, stats)
        vectors = vectors_of(group)
        factors_of_all = slerp_factors(gram(vectors, group.scratch("product"), self.per), self.straight(p)[1])
        total = group.scratch("total").zero_()
        rows = total.view(1, -1) if total.dim() < 2 else total.view(len(total), -1)
        for vector, factors in zip(vectors, factors_of_all.to(total.dtype).unbind(1), strict=True):
            rows.addcmul_(
                vector.view_as(rows), factors if self.per == "column" and total.dim() > 1 else factors[:, None]
            )
        return total if group.base is None else group.base.add_(total)
