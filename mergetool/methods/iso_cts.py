"""Merge the directions that tasks share and the ones that are their own, all equally strong.

Iso-C flattens the spectrum of the sum of task vectors, but the weakest directions of that sum matter to nobody.
Iso-CTS keeps the strongest share of them (`common`) and fills the rest with the strongest directions that each task has
outside the common space; then all are made orthogonal and get one singular value, the mean. Weights that are no
matrices (norms, biases) are averaged.

Reference: Marczak et al., No Task Left Behind, ICML 2025, https://arxiv.org/abs/2502.04959, section 5 (Iso-CTS).
Differs from the paper: directions in which nothing changed are left out, where the authors' code puts arbitrary ones at
full strength; a tensor with fewer rows or columns than there are models has common directions only; embeddings are
not matrices unless `filter` says so; weights per model multiply task vectors.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.arch.matrices import MatrixFilter, is_matrix
from mergetool.methods.base import (
    Field,
    Finite,
    Params,
    PerModel,
    Reach,
    Scheduled,
    Stats,
    TensorGroup,
    TensorMethod,
    Unit,
)

if TYPE_CHECKING:
    from torch import Tensor


class IsoCts(TensorMethod):
    """`base + scale * mean(S) * U' V'^T` over common directions and ones that belong to single tasks"""

    method: Literal["iso-cts"] = "iso-cts"
    scale: Scheduled[Finite] = Field(1.0, description="factor on the merged task vector (alpha in the paper)")
    weight: PerModel[Finite] = Field(1.0, description="factor on each task vector; 0 leaves the model out")
    common: Unit = Field(0.8, description="share of the directions that is common to all tasks")
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
        parts = [delta.mul_(weight) for delta, weight in zip(group.deltas, p.weight, strict=True) if weight]
        if not parts:
            return group.base
        matrix = self.reach_in(group.name, group.shape) == "tensor"
        if matrix and all(bool(delta.isfinite().all()) for delta in parts):
            from mergetool.kernels.isotropic import isotropic_in_spaces

            update = isotropic_in_spaces([delta.flatten(1) for delta in parts], self.common)
            return group.base.add_(update.to(group.base.dtype).view_as(group.base), alpha=p.scale)
        for delta in parts:
            group.base.add_(delta, alpha=p.scale / len(parts))
        return group.base

    def reach_in(self, name: str, shape: tuple[int, ...]) -> Reach:
        return "tensor" if is_matrix(name, shape, self.filter, conv=self.conv) else "element"
