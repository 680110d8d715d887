"""Add task vectors up, then make all directions of the sum equally strong.

The sum of task vectors is dominated by the few directions that many tasks share, and what single tasks need is
drowned. Iso-C keeps the sum's singular vectors and gives every one of them the same singular value, their mean.
Weights that are no matrices (norms, biases) are averaged. The best `scale` grows with the model and shrinks with the
number of tasks: 1 to 1.5 in the paper.

Reference: Marczak et al., No Task Left Behind, ICML 2025, https://arxiv.org/abs/2502.04959, section 4 (Iso-C).
Differs from the paper: directions in which no model changed anything stay unchanged, where the authors' code raises
rounding noise to the mean; embeddings are not matrices unless `filter` says so; weights per model
multiply task vectors.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.arch.matrices import MatrixFilter, is_matrix
from mergetool.methods.base import Field, Finite, Params, PerModel, Reach, Scheduled, Stats, TensorGroup, TensorMethod

if TYPE_CHECKING:
    from torch import Tensor


class IsoC(TensorMethod):
    """`base + scale * mean(S) * U V^T`, where `U S V^T` is the sum of the task vectors"""

    method: Literal["iso-c"] = "iso-c"
    scale: Scheduled[Finite] = Field(1.0, description="factor on the merged task vector (alpha in the paper)")
    weight: PerModel[Finite] = Field(1.0, description="factor on each task vector; 0 leaves the model out")
    filter: MatrixFilter = Field(
        "llm", description="which two-dimensional tensors are treated as matrices; all others are averaged"
    )
    conv: Literal["mean", "matricize"] = Field(
        "mean", description="average tensors of more than two dimensions, or treat them as (out, everything else)"
    )
    needs_base: ClassVar = "required"
    reach: ClassVar = "tensor"
    buffers: ClassVar = 16
    neutral: ClassVar = {"filter": "none"}

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        assert group.base is not None
        parts = [(delta, weight) for delta, weight in zip(group.deltas, p.weight, strict=True) if weight]
        if not parts:
            return group.base
        total = group.scratch(0).zero_()
        for delta, weight in parts:
            total.add_(delta, alpha=weight)
        if self.reach_in(group.name, group.shape) == "tensor" and bool(total.isfinite().all()):
            from mergetool.kernels.isotropic import isotropic

            total = isotropic(total.flatten(1)).to(total.dtype).view_as(total)
        else:
            total /= len(parts)
        return group.base.add_(total, alpha=p.scale)

    def reach_in(self, name: str, shape: tuple[int, ...]) -> Reach:
        return "tensor" if is_matrix(name, shape, self.filter, conv=self.conv) else "element"
