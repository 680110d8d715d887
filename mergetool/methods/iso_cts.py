"""Merge the directions that tasks share and the ones that are their own, all equally strong.

Iso-C flattens the spectrum of the sum of task vectors, but the weakest directions of that sum matter to nobody.
Iso-CTS keeps the strongest share of them (`common`) and fills the rest with the strongest directions that each task has
outside the common space; then all are made orthogonal and get one singular value, the mean. Weights that are no
matrices (norms, biases) are averaged. `scale: recover` gives task vectors the length back that flattening takes.

Reference: Marczak et al., No Task Left Behind, ICML 2025, https://arxiv.org/abs/2502.04959, section 5 (Iso-CTS).
Differs from the paper: directions in which nothing changed are left out, where the authors' code puts arbitrary ones at
full strength; the scale is counted, not tuned on data; a tensor with fewer rows or columns than there are models has
common directions only; embeddings are not matrices unless `filter` says so; weights per model multiply task vectors.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Field, Scale, TensorGroup, Unit
from mergetool.methods.families.matrix import weighted
from mergetool.methods.families.recovering import DEPENDS, SCALE, RecoveringMethod

if TYPE_CHECKING:
    from torch import Tensor


class IsoCts(RecoveringMethod):
    """`base + scale * mean(S) * U' V'^T` over common directions and ones that belong to single tasks"""

    method: Literal["iso-cts"] = "iso-cts"
    scale: Scale = Field("recover", description=SCALE)
    common: Unit = Field(0.8, description="share of the directions that is common to all tasks")
    exempt: ClassVar = DEPENDS
    neutral: ClassVar = {"filter": "none"}

    def merged(self, group: TensorGroup, matrices: "list[Tensor]", weights: Sequence[float], size: int) -> "Tensor":
        from mergetool.kernels.isotropic import isotropic_in_spaces

        return isotropic_in_spaces(weighted(matrices, weights), self.common, size)
