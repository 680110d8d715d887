"""Linear layers by regression of their outputs: the closed solution, whatever the inputs were measured on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from mergetool.methods.base import Field, Granularity, Params, Positive, Scheduled, Stats, TensorGroup, Unit
from mergetool.methods.families.measured import MeasuredMethod, mean

if TYPE_CHECKING:
    from torch import Tensor

_WORST_RIDGE = 1.0
"""Beyond this the average does: the matrix is no Gram matrix."""


class Regression(MeasuredMethod):
    """The matrix whose outputs differ least from those of every model, by Gram matrices of their inputs."""

    alpha: Scheduled[Unit] = Field(0.9, description="factor on what lies off the diagonals of Gram matrices")
    ridge: Scheduled[Positive] = Field(
        1e-6, description="pull towards the average, as a share of the mean of the diagonal"
    )
    granularity: ClassVar = "tensor"
    buffers: ClassVar = 10

    @property
    def needs_float64(self) -> bool:
        return True

    def granularity_in(self, name: str, shape: tuple[int, ...]) -> Granularity:
        return "tensor"

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        import torch

        measured = group.measured
        assert measured is not None
        if not all(bool(model.isfinite().all()) for model in group.models):  # the check of the result says whose
            return mean(group.models, p.weight)
        matrices = [model.mT if measured.turned else model for model in group.models]  # (outputs, inputs)
        middle = mean([matrix.to(torch.float64, copy=True) for matrix in matrices], p.weight)
        left, right = _system(group, matrices, middle, p)
        change = _solved(left, right, p.ridge)
        if change is None:
            group.note("nothing goes into it: averaged")
            merged = middle
        else:
            merged = middle.add_(change.T)
        return (merged.mT if measured.turned else merged).to(group.models[0].dtype).contiguous()


def _system(group: TensorGroup, matrices: "Sequence[Tensor]", middle: "Tensor", p: Params) -> "tuple[Tensor, Tensor]":
    """`sum w_i G_i` and `sum w_i G_i (W_i - middle)^T`, in float64."""
    import torch

    assert group.measured is not None
    width = middle.shape[1]
    left, right = middle.new_zeros(width, width), middle.new_zeros(width, middle.shape[0])
    for place, (weight, matrix) in enumerate(zip(p.weight, matrices, strict=True)):
        if not weight:
            continue
        gram = group.measured.of(place).to(torch.float64, copy=True)
        diagonal = gram.diagonal().clone()
        gram.mul_(p.alpha * weight).diagonal().copy_(diagonal * weight)
        left.add_(gram)
        right.addmm_(gram, (matrix.double() - middle).T)
    return left, right


def _solved(left: "Tensor", right: "Tensor", ridge: float) -> "Tensor | None":
    """The solution with the smallest ridge from this on that works; None where no input has any length."""
    import torch

    size = float(left.diagonal().mean())
    if not size > 0:
        return None
    while ridge <= _WORST_RIDGE:
        shifted = left.clone()
        shifted.diagonal().add_(ridge * size)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not int(failed):
            solution: Tensor = torch.cholesky_solve(right, factor)
            return solution
        ridge = max(10 * ridge, 1e-12)
    return None
