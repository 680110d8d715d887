"""Add task vectors up, then make all directions of the sum equally strong.

The sum of task vectors is dominated by the few directions that many tasks share, and what single tasks need is
drowned. Iso-C keeps the sum's singular vectors and gives every one of them the same singular value, their mean.
Weights that are no matrices (norms, biases) are averaged. What is flattened holds less of every task vector, and
`scale: recover` gives them their length back on average (1 to 1.5 by hand in the paper).

Reference: Marczak et al., No Task Left Behind, ICML 2025, https://arxiv.org/abs/2502.04959, section 4 (Iso-C).
Differs from the paper: directions in which no model changed anything stay unchanged, where the authors' code raises
rounding noise to the mean; the scale is counted, not tuned on data; embeddings are not matrices unless `filter` says
so; weights per model multiply task vectors.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Field, Scale, TensorGroup
from mergetool.methods.families.recovering import DEPENDS, SCALE, RecoveringMethod

if TYPE_CHECKING:
    from torch import Tensor


class IsoC(RecoveringMethod):
    """`base + scale * mean(S) * U V^T`, where `U S V^T` is the sum of the task vectors"""

    method: Literal["iso-c"] = "iso-c"
    scale: Scale = Field("recover", description=SCALE)
    exempt: ClassVar = DEPENDS
    neutral: ClassVar = {"filter": "none"}

    def merged(self, group: TensorGroup, matrices: "list[Tensor]", weights: Sequence[float], size: int) -> "Tensor":
        from mergetool.kernels.isotropic import isotropic

        total = matrices[0] * weights[0]
        for matrix, weight in zip(matrices[1:], weights[1:], strict=True):
            total.add_(matrix, alpha=weight)
        return isotropic(total, size)
