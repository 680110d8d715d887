"""Cut small directions off each task vector, make the others longer for it, average.

Small singular values of a task vector are mostly noise that gets into the way of other tasks. STAR keeps the leading
ones that make up a `share` of their sum, and scales them up until the sum (the nuclear norm) is what it was. Then task
vectors are averaged. Weights that are no matrices (norms, biases) are averaged as they are.

Reference: Lee et al., STAR: Spectral Truncation and Rescale for Model Merging, NAACL 2025,
https://arxiv.org/abs/2502.10339.
Differs from the paper: embeddings are not matrices unless `filter` says so; weights per model multiply task vectors.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Field, Fraction, TensorGroup
from mergetool.methods.families.matrix import ScaledMatrixMethod

if TYPE_CHECKING:
    from torch import Tensor


class Star(ScaledMatrixMethod):
    """`base + scale * mean of U_k S_k V_k^T * sum(S) / sum(S_k)`, k directions of each task vector"""

    method: Literal["star"] = "star"
    share: Fraction = Field(0.4, description="share of the sum of each task vector's singular values that is kept")
    neutral: ClassVar = {"share": 1.0}

    def merged(self, group: TensorGroup, matrices: "list[Tensor]", weights: Sequence[float], size: int) -> "Tensor":
        from mergetool.kernels.spectra import with_its_nuclear_norm

        parts = zip(matrices, weights, strict=True)
        first, *others = (
            with_its_nuclear_norm(m, self.share).scaled(weight / len(matrices)).dense() for m, weight in parts
        )
        for other in others:
            first += other
        return first
