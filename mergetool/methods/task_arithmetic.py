"""Add task vectors to the base.

A task vector is what fine-tuning changed: `model - base`. The result is the base plus the weighted sum of the task
vectors, times `scale`. A negative weight removes what a model learnt. The usual range of `scale` is 0.3 to 1; with
more models, less.

Reference: Ilharco et al., Editing models with task arithmetic, ICLR 2023, https://arxiv.org/abs/2212.04089, section 2.
Differs from the paper: weights may differ by model, and `normalize` can divide by their sum.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import (
    Factored,
    Field,
    Finite,
    Params,
    PerModel,
    Scheduled,
    Stats,
    TensorGroup,
    TensorMethod,
    cancel,
)

if TYPE_CHECKING:
    from torch import Tensor


class TaskArithmetic(TensorMethod):
    """`base + scale * sum(w_i (x_i - base))`"""

    method: Literal["task-arithmetic"] = "task-arithmetic"
    weight: PerModel[Finite] = Field(1.0, description="weight of each task vector")
    scale: Scheduled[Finite] = Field(1.0, description="factor on the sum of task vectors (lambda in the paper)")
    normalize: bool = Field(False, strict=True, description="divide by the sum of the weights")
    needs_base: ClassVar = "required"
    granularity: ClassVar = "element"
    buffers: ClassVar = 1
    neutral: ClassVar = {"normalize": True}

    def problem(self, p: Params) -> str | None:
        if self.normalize and cancel(p.weight):
            return f"the weights {p.weight} add up to 0, so they cannot be normalised"
        return None

    def in_factors(self, name: str, shape: tuple[int, ...]) -> Factored:
        return "sum"

    def coefficients(self, p: Params) -> tuple[float, ...]:
        factor = p.scale / sum(p.weight) if self.normalize else p.scale
        return tuple(factor * weight for weight in p.weight)

    def change(self, group: TensorGroup, p: Params, stats: Stats) -> "tuple[Tensor, float]":
        total = group.scratch("total").zero_()
        for weight, delta in zip(p.weight, group.deltas, strict=True):
            total.add_(delta, alpha=weight)
        return total, sum(p.weight) if self.normalize else 1.0

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        total, divisor = self.change(group, p, stats)
        assert group.base is not None
        return group.base.add_(total, alpha=p.scale / divisor)
