"""Lift the weak directions of what merging changed of each matrix.

The more models are merged, the fewer directions hold most of the merged task vector, and what single tasks need is
lost. Its singular values are added up from the largest one on until they make up a `share` of all; no later one stays
smaller than the one reached then. With `share: 1` nothing changes, with little all directions are as strong as the
first: then the merge wants a smaller `scale`. Vectors stay as they are, and so do tensors that are no matrices.

Reference: Skorobogat et al., Subspace-Boosted Model Merging, https://arxiv.org/abs/2506.16506.
Differs from the paper: directions in which nothing was changed stay so; embeddings are not matrices unless `filter`
says so.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.arch.matrices import MatrixFilter, is_matrix
from mergetool.methods.then import After, Field, Granularity, Params, TensorGroup, Unit

if TYPE_CHECKING:
    from torch import Tensor


class SubspaceBoosting(After):
    """`sum_i max(s_i, s_k) u_i v_i` of `change = sum_i s_i u_i v_i`, `s_1 + ... + s_k >= share * sum s`"""

    step: Literal["subspace-boosting"] = "subspace-boosting"
    share: Unit = Field(description="share of the sum of the singular values (beta in the paper)")
    filter: MatrixFilter = Field("llm", description="which two-dimensional tensors are treated as matrices")
    needs_base: ClassVar = True
    buffers: ClassVar = 16

    def granularity_in(self, name: str, shape: tuple[int, ...]) -> Granularity:
        return "tensor" if is_matrix(name, shape, self.filter, conv="mean") else "element"

    def apply(self, change: "Tensor", seen: "Tensor | None", group: TensorGroup, p: Params) -> "Tensor":
        from mergetool.kernels.spectra import lifted

        whole = self.granularity_in(group.name, group.shape) == "tensor"
        if not whole or not bool(change.isfinite().all()):  # the check of the result will say whose
            return change
        return change.copy_(lifted(change, self.share))
