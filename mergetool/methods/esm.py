"""Keep of each task vector the directions along which its layer's outputs change most, and make them orthogonal.

TSV-Merge keeps the leading singular vectors of a change D of weights, whatever goes into the layer. What matters is how
much outputs change: with the Gram matrix G of the layer's inputs on a few rows of data (section `calibration`; 32 are
enough), the leading eigenvectors P of `D G D^T` are those directions, and `P^T D` is what reads them. The pairs of all
tasks are made orthogonal, left and right. Before that, large ones are made larger: a task counts by the square of its
length, and so does an input of the layer (`contrast`).

Matrices of which nothing was measured are merged as TSV-Merge does; norms and biases are averaged.

Reference: Li et al., Model Merging in the Essential Subspace (ESM), CVPR 2026, https://arxiv.org/abs/2602.20208.
Differs from the paper: inputs are summed up as Gram matrices, over all rows, where the authors' code takes the
eigenvectors of changed outputs themselves (the same); directions along which nothing changes are left out; no scaling
between layers of one kind, which would need all of them at once. Measured matrices count twice, as in their code for
vision transformers: without, the result is too short.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import model_validator

from mergetool.methods.base import RANK, Factored, Field, Params, Positive, Rank, TensorGroup
from mergetool.methods.families.matrix import ScaledMatrixMethod, chosen_of, most_directions

if TYPE_CHECKING:
    from torch import Tensor


class EssentialSubspaceMerging(ScaledMatrixMethod):
    """`base + scale * P' A'`: orthogonal directions of what changes outputs most, and what reads them, `A = P^T D`"""

    method: Literal["esm"] = "esm"
    rank: Rank = Field("auto", description=RANK)
    energy: Positive = Field(0.15, description="how much more a direction counts the more it changes; 0: all alike")
    contrast: Positive = Field(2.0, description="power of the relative length of tasks and inputs; 0: all alike")
    statistic: ClassVar = "gram"
    buffers: ClassVar = 24
    neutral: ClassVar = {"filter": "none"}

    @model_validator(mode="after")
    def _measures_each_layer(self) -> Self:
        if self.fuse != "none":
            raise ValueError("esm knows the outputs of each layer by itself: write `fuse: none`")
        return self

    def needs_weights(self) -> str | None:
        return "it runs whole models on data"

    def in_factors(self, name: str, shape: tuple[int, ...]) -> Factored:
        return "product"

    def update(self, group: TensorGroup, p: Params) -> "Tensor | None":
        from mergetool.kernels.essential import essential_pair, joined

        chosen, measured = chosen_of(p), group.measured
        matrix = measured is not None and self.granularity_in(group.name, group.shape) == "tensor"
        if not matrix or not chosen or not all(bool(group.deltas[k].isfinite().all()) for k, _ in chosen):
            return super().update(group, p)
        assert measured is not None
        changes = [(group.deltas[k].mT if measured.turned else group.deltas[k]).double() for k, _ in chosen]
        grams = (measured.of(k).double() for k, _ in chosen)
        pairs = [
            essential_pair(*both, self.rank, len(chosen), self.energy) for both in zip(changes, grams, strict=True)
        ]
        if not any(pair.outputs.shape[1] for pair in pairs):
            group.note("nothing that is kept changes outputs: averaged")
            return None
        lengths = [float(each.norm()) for each in changes]
        made = joined(pairs, [weight for _, weight in chosen], lengths, self.contrast)
        return (made.mT if measured.turned else made).to(group.models[0].dtype).contiguous()

    def merged(
        self, group: TensorGroup, matrices: "list[Tensor]", weights: Sequence[float], size: int
    ) -> "Tensor | None":
        from mergetool.kernels.spectral import concatenated, kept, live_factors_of, orthogonalised

        if not (most := most_directions(group, self.rank, size, len(matrices))):
            return None
        factors = live_factors_of(matrices, most)
        every = concatenated(
            [kept(each, self.rank).scaled(weight) for each, weight in zip(factors, weights, strict=True)]
        )
        return orthogonalised(every).to(matrices[0].dtype).dense()
