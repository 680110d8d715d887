"""Learn how much of each task vector to take, so that the merged model is sure of its answers.

The result is the base plus the sum of task vectors, each times a coefficient: one for every tensor of every model, or
with `per: model` one for every model. They start at `start`, and Adam changes them for so many `steps`, in each of
which a `batch` of rows of every model's data (section `calibration`) goes through the merged model under the head of
that model. What is made smaller is the entropy of its answers, which needs no labels, or with `loss: cross-entropy`
that of the classes that rows have (of the next tokens, in language models, which is what these want). The coefficients
stand in the lock. `density` below 1 keeps of each task vector the largest entries, and of those the ones whose sign
wins: AdaMerging++.

Reference: Yang et al., AdaMerging: Adaptive Model Merging for Multi-Task Learning, ICLR 2024,
https://arxiv.org/abs/2310.02575.
Differs from the paper: rows are those of the recipe, as few as they are, not a stream of test data; so that nothing is
padded, rows of one length go together; no dropout. Coefficients stay between 0 and 1, as in the authors' code. Its
numbers are the defaults: 500 steps of 16 rows, rate 0.001; fewer steps want a larger `rate`.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from mergetool.methods.base import Field, Finite, Fraction, Granularity, Params, Stats, TensorGroup, TensorMethod
from mergetool.methods.families.measured import numbers

if TYPE_CHECKING:
    from torch import Tensor

_Count = Annotated[int, Field(ge=1, strict=True)]


class _AsAtStart(TensorMethod):
    """What was not learnt: the sum of task vectors, times one number."""

    start: Finite = 0.3
    needs_base: ClassVar = "required"
    granularity: ClassVar = "element"
    buffers: ClassVar = 0

    def treatment(self, name: str, shape: tuple[int, ...]) -> str:
        return "sum"

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        return _sum(group, [self.start] * len(group.models))


class AdaMerging(TensorMethod):
    """`base + sum_i c_i (x_i - base)`, c_i learnt"""

    method: Literal["ada-merging"] = "ada-merging"
    loss: Literal["entropy", "cross-entropy"] = Field(
        "entropy", description="what is made smaller: how unsure answers are, or how surprising what is given is"
    )
    per: Literal["tensor", "model"] = Field("tensor", description="what has one coefficient")
    steps: _Count = Field(500, description="steps of Adam")
    rate: Annotated[Finite, Field(gt=0)] = Field(1e-3, description="how far a coefficient goes in one step, about")
    batch: _Count = Field(16, description="rows of every model in each step")
    start: Finite = Field(0.3, description="what all coefficients are at first")
    density: Fraction = Field(1.0, description="share of each task vector that is kept; below 1, losing signs are not")
    needs_base: ClassVar = "required"
    granularity: ClassVar = "tensor"
    buffers: ClassVar = 6
    statistic: ClassVar = "coefficient"
    exempt: ClassVar = dict.fromkeys(
        ("single", "copies", "float64"), "coefficients are learnt, and need not add up to 1"
    )

    def granularity_in(self, name: str, shape: tuple[int, ...]) -> Granularity:
        return "element" if self.density == 1.0 else "tensor"

    def measuring(self) -> dict[str, Any]:
        return self.model_dump(exclude={"method"})

    def needs_weights(self) -> str | None:
        return "it runs whole models on data"

    def unmeasured(self) -> TensorMethod:
        return _AsAtStart(start=self.start)

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        coefficients = numbers(group)
        for name, value in zip(group.names, coefficients, strict=True):
            group.measure(f"coefficient of {name}", value)
        if self.density < 1.0:
            from mergetool.kernels.consensus import keep_elected_

            keep_elected_(group.deltas, self.density)
        return _sum(group, coefficients)


def _sum(group: TensorGroup, coefficients: list[float]) -> "Tensor":
    assert group.base is not None
    for coefficient, delta in zip(coefficients, group.deltas, strict=True):
        group.base.add_(delta, alpha=coefficient)
    return group.base
