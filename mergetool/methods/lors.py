"""Keep of each task vector its leading directions, and of what is left its largest entries; add these up.

What fine-tuning changed in a weight matrix is partly a few directions, which act everywhere, and partly single entries,
which no few directions hold. Each task vector is made into the two: its leading singular directions (`rank`), and the
largest `density` of the entries of the rest. Everything else is dropped before task vectors are added up. Weights that
are no matrices (norms, biases) are averaged.

Reference: Zhao et al., Low-Rank and Sparse Model Merging for Multi-Lingual Speech Recognition and Translation, 2025,
https://arxiv.org/abs/2502.17380 (LoRS-Merging).
Differs from the paper: it is its idea, made without its code: entries are those of what the directions leave, and
thresholds those of one matrix. `rank` may be a share of the energy, so that every matrix keeps as many directions as it
needs; `density: 0` keeps directions alone; embeddings are not matrices unless `filter` says so.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import RANK, Factored, Field, Rank, TensorGroup, Unit
from mergetool.methods.families.matrix import ScaledMatrixMethod

if TYPE_CHECKING:
    from torch import Tensor


class Lors(ScaledMatrixMethod):
    """`base + scale * sum(w_i (leading directions of x_i - base, and the largest entries of the rest))`"""

    method: Literal["lors"] = "lors"
    rank: Rank = Field("auto", description=RANK)
    density: Unit = Field(0.05, description="share of the entries of what is left that is kept")
    buffers: ClassVar = 20
    neutral: ClassVar = {"filter": "none"}

    def in_factors(self, name: str, shape: tuple[int, ...]) -> Factored:
        return "product" if self.density else "cores"  # entries are those of the weights, not of any core

    def merged(
        self, group: TensorGroup, matrices: "list[Tensor]", weights: Sequence[float], size: int
    ) -> "Tensor | None":
        import torch

        from mergetool.kernels.directions import trim_
        from mergetool.kernels.spectral import kept, live_factors_of, rank_limit

        total = torch.zeros_like(matrices[0], dtype=torch.float64)
        most = min(rank_limit(self.rank, size, len(matrices)), *matrices[0].shape)
        leading = live_factors_of(matrices, most) if most else [None] * len(matrices)
        for matrix, weight, factors in zip(matrices, weights, leading, strict=True):
            part = torch.zeros_like(total) if factors is None else kept(factors, self.rank).dense()
            if self.density:
                part = part + trim_(matrix.to(torch.float64) - part, self.density)
            total.add_(part, alpha=weight)
        return total
