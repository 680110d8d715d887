"""Take the slow waves out of task vectors, then add them up: FR-Merging, the merged model of FREE-Merging.

Seen as a picture, a weight matrix is a sum of waves. What fine-tuning changed in its slow waves is common to whole
regions of the matrix, and it is there that tasks disturb one another. So of every task vector's matrices the waves
below `cutoff` are taken out, and what is left is added up. Weights that are no matrices (norms, biases) are averaged.

Reference: Zheng and Wang, FREE-Merging: Fourier Transform for Efficient Model Merging, ICCV 2025,
https://arxiv.org/abs/2411.16815, section 4 (FR-Merging, without experts).
Differs from the paper: `variant: paper` drops what is slow along both axes together, in any shape of matrix. The
authors' code keeps what is near the middle of a transform that has not been shifted (`variant: authors`, with a radius
of `1 - cutoff`): of a square matrix it drops next to nothing up to a `cutoff` of 0.29, of a long one more than a third
at 0.1. (Theirs counts the few waves twice that are exactly at a smaller radius.) The authors' cutoffs are 0.3 for
vision models, 0.1 for large language models. Which tensors are matrices `filter` says: the authors' choice differs by
script.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Factored, Field, TensorGroup, Unit
from mergetool.methods.families.matrix import ScaledMatrixMethod

if TYPE_CHECKING:
    from torch import Tensor


class Free(ScaledMatrixMethod):
    """`base + scale * sum(w_i fast waves of (x_i - base))`"""

    method: Literal["free"] = "free"
    cutoff: Unit = Field(0.1, description="frequency below which waves are dropped: 0 none, 1 nearly all")
    variant: Literal["paper", "authors"] = Field(
        "paper", description="drop slow waves, or keep what lies around the middle of the transform"
    )
    neutral: ClassVar = {"cutoff": 0.0, "filter": "none"}

    @property
    def needs_float64(self) -> bool:
        return False

    def in_factors(self, name: str, shape: tuple[int, ...]) -> Factored:
        return "product"  # waves run over entries, whatever directions they are made of

    def merged(self, group: TensorGroup, matrices: "list[Tensor]", weights: Sequence[float], size: int) -> "Tensor":
        from mergetool.kernels.frequencies import high_pass, near_fastest

        total = matrices[0] * weights[0]
        for matrix, weight in zip(matrices[1:], weights[1:], strict=True):
            total.add_(matrix, alpha=weight)  # filters are linear: one for all
        return high_pass(total, self.cutoff) if self.variant == "paper" else near_fastest(total, 1.0 - self.cutoff)
