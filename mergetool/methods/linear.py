"""Weighted average of models.

Every parameter of the result is the weighted mean of that parameter in the models: `sum(w_i x_i) / sum(w_i)`.
Models fine-tuned from one ancestor usually lie in one basin, where averages are good models; models trained from
different seeds do not (align them first).

Reference: Wortsman et al., Model soups, ICML 2022, https://arxiv.org/abs/2203.05482, section 2 (uniform soup).
Differs from the paper: weights may differ by model and along depth, and need not be normalised.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Factored, Field, Finite, Params, PerModel, Stats, TensorGroup, TensorMethod, cancel

if TYPE_CHECKING:
    from torch import Tensor


class Linear(TensorMethod):
    """`sum(w_i x_i) / sum(w_i)`"""

    method: Literal["linear"] = "linear"
    weight: PerModel[Finite] = Field(1.0, description="weight of each model")
    normalize: bool = Field(True, strict=True, description="divide by the sum of the weights")
    needs_base: ClassVar = "unused"
    granularity: ClassVar = "element"
    buffers: ClassVar = 0
    folds: ClassVar = True
    neutral: ClassVar = {"normalize": True}

    def problem(self, p: Params) -> str | None:
        if (self.normalize and cancel(p.weight)) or not any(p.weight):
            return f"the weights {p.weight} add up to 0, so their average does not exist"
        return None

    def in_factors(self, name: str, shape: tuple[int, ...]) -> Factored:
        return "sum"

    def coefficients(self, p: Params) -> tuple[float, ...]:
        total = sum(p.weight) if self.normalize else 1.0
        return tuple(weight / total for weight in p.weight)

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        total = sum(p.weight) if self.normalize else 1.0
        out = group.models[0].mul_(p.weight[0] / total)
        for weight, model in zip(p.weight[1:], group.models[1:], strict=True):
            out.add_(model, alpha=weight / total)
        return out
