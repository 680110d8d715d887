"""Disturb every task least on inputs that look like its own task vector: RegMean without data.

What fine-tuning writes into a weight matrix are combinations of its inputs, so the rows of a task vector tell where
the inputs of its task lie. WUDI looks for the merge that differs least from each task vector on these; in closed form
that is RegMean, with covariances from the task vectors themselves. `ridge` holds back in directions that no task uses.
Weights that are no matrices (norms, biases) are averaged. The result has its length already: more `scale` does harm.

`normalize: false` with `ridge: 0` is ActMat: long task vectors count for more.

Reference: Cheng et al., WUDI-Merging, ICML 2025, https://arxiv.org/abs/2503.08099.
Differs from the paper: the exact minimum with a ridge, where theirs takes 300 steps of Adam from the sum of the task
vectors; weights stored as (inputs, outputs), as those of GPT-2, are seen by their outputs; embeddings are not matrices
unless `filter` says so; weights per model multiply task vectors.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Field, Positive, TensorGroup
from mergetool.methods.families.matrix import ScaledMatrixMethod, weighted

if TYPE_CHECKING:
    from torch import Tensor


class Wudi(ScaledMatrixMethod):
    """`base + scale * (sum D_t G_t) (sum G_t + ridge)^-1`, `G_t = D_t^T D_t / |D_t|^2`"""

    method: Literal["wudi"] = "wudi"
    ridge: Positive = Field(
        0.001, description="added to the sum of the G_t, as a share of their mean trace; 0: the pseudo-inverse"
    )
    normalize: bool = Field(True, strict=True, description="divide each G_t by the squared norm of its task vector")
    neutral: ClassVar = {"filter": "none"}

    def merged(self, group: TensorGroup, matrices: "list[Tensor]", weights: Sequence[float], size: int) -> "Tensor":
        from mergetool.kernels.own_inputs import least_disturbing

        return least_disturbing(weighted(matrices, weights), self.ridge, normalize=self.normalize)
