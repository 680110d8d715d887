"""Disturb every task least in the directions that tasks use, and add up in the others.

Like WUDI, task vectors stand in for the inputs of their tasks, and the merge that disturbs these least is known in
closed form. Where no task uses a direction of inputs much, that form divides by almost nothing; SWUDI goes over
to the plain sum there, softly (`steepness`), and keeps to it for all but the leading directions (`share`). Weights that
are no matrices (norms, biases) are averaged. The result has its length already: more `scale` does harm.

Reference: SWUDI, https://arxiv.org/abs/2606.07289.
Differs from the paper: float64; weights stored as (inputs, outputs), as those of GPT-2, are seen by their outputs;
embeddings are not matrices unless `filter` says so; weights per model multiply task vectors.
"""

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Field, Fraction, Positive, TensorGroup
from mergetool.methods.families.matrix import ScaledMatrixMethod, weighted

if TYPE_CHECKING:
    from torch import Tensor


class Swudi(ScaledMatrixMethod):
    """`base + scale * (S - S Q f Q^T + sum D_t G_t Q (f / l) Q^T)`, `sum G_t = Q l Q^T`, `f = 1 - exp(-steepness l)`"""

    method: Literal["swudi"] = "swudi"
    share: Fraction = Field(0.65, description="share of the directions of inputs, from the most used one on")
    steepness: Positive = Field(300.0, description="how soon a direction that is used counts as such")
    neutral: ClassVar = {"filter": "none"}

    def merged(self, group: TensorGroup, matrices: "list[Tensor]", weights: Sequence[float], size: int) -> "Tensor":
        from mergetool.kernels.own_inputs import softly_least_disturbing

        return softly_least_disturbing(weighted(matrices, weights), self.share, self.steepness, prod(group.shape[1:]))
