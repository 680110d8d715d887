"""The centre of models or task vectors on the sphere: the direction nearest to all of theirs.

The Karcher mean is the point of the sphere with the least sum of squared arcs to the directions of the models; there is
one way to it from any of them, whatever their order and number, which repeated `slerp` does not give. It is as long as
the models are on average. With a `base` the vectors are task vectors.

Reference: Grove and Karcher, How to conjugate C1-close group actions, Math. Z. 1973; for models, mergekit's method of
this name, https://arxiv.org/abs/2603.04972.
Differs from the paper: models may have weights. All steps are made with the inner products of the vectors (the point is
always a combination of them), in float64, so they cost nothing. A model whose tensor is zero has a length, but no
direction.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from mergetool.methods.base import Field, Finite, Params, PerModel, Positive
from mergetool.methods.families.sphere import SphereMethod, shares

if TYPE_CHECKING:
    from torch import Tensor


class Karcher(SphereMethod):
    """`base + mean length * argmin over directions u of sum(w_i angle(u, x_i - base)^2)`"""

    method: Literal["karcher"] = "karcher"
    weight: PerModel[Positive] = Field(1.0, description="weight of each model")
    max_iter: Annotated[int, Field(strict=True, ge=0)] = Field(100, description="steps at most")
    tol: Annotated[Finite, Field(gt=0)] = Field(1e-7, description="length of a step (an angle) that ends the search")

    def problem(self, p: Params) -> str | None:
        return None if any(p.weight) else f"the weights {p.weight} add up to 0, so their mean does not exist"

    def factors(self, gram: "Tensor", p: Params) -> "Tensor":
        import torch

        from mergetool.kernels.sphere import karcher_mean, unit_gram

        units, lengths = unit_gram(gram)
        weights = torch.tensor(self.straight(p), dtype=torch.float64)
        if not bool((weights * lengths).any()):
            return torch.zeros_like(weights)
        point = karcher_mean(units, weights, self.max_iter, self.tol)
        return torch.where(lengths > 0, point * (weights @ lengths) / lengths, 0.0)

    def straight(self, p: Params) -> tuple[float, ...]:
        return shares(p.weight)
