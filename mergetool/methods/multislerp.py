"""The mean direction of any number of models or task vectors, at the mean of their lengths.

An average of vectors that point different ways is shorter than any of them. Here directions are averaged on their own,
with weights, and the result is as long as the vectors are on average. With a `base` the vectors are task vectors.

Reference: Goddard, Multi-SLERP, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea.
Differs from the paper: it projects directions onto the tangent space at their mean and adds them up there, and that sum
is zero; so it is left out. Where directions cancel the straight line is taken, for any number of models.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Field, Finite, Params, PerModel, cancel
from mergetool.methods.families.sphere import SphereMethod, shares

if TYPE_CHECKING:
    from torch import Tensor


class Multislerp(SphereMethod):
    """`base + sum(w_i |d_i|) * direction of sum(w_i d_i / |d_i|)`, d_i = x_i - base"""

    method: Literal["multislerp"] = "multislerp"
    weight: PerModel[Finite] = Field(1.0, description="weight of each model")
    normalize: bool = Field(True, strict=True, description="divide the weights by their sum")
    neutral: ClassVar = {"normalize": True}

    def problem(self, p: Params) -> str | None:
        if self.normalize and cancel(p.weight):
            return f"the weights {p.weight} add up to 0, so they cannot be normalised"
        return None

    def factors(self, gram: "Tensor", p: Params) -> "Tensor | None":
        import torch

        from mergetool.kernels.sphere import mean_direction, unit_gram

        units, lengths = unit_gram(gram)
        weights = torch.tensor(self.straight(p), dtype=torch.float64)
        direction = mean_direction(units, weights)
        if direction is None:
            return None
        return torch.where(lengths > 0, direction * (weights @ lengths) / lengths, 0.0)

    def straight(self, p: Params) -> tuple[float, ...]:
        return shares(p.weight) if self.normalize else tuple(p.weight)
