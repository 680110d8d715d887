"""Keep each task vector's leading singular vectors, make those of different tasks orthogonal, add up.

The change that fine-tuning makes to a weight matrix has few directions that matter. TSV-Merge keeps, of every task
vector, as many as fit side by side (the smaller dimension divided by the number of models) and replaces them by the
nearest set of mutually orthogonal directions, left and right, so that no task reads what another one writes. Singular
values stay as they are. Weights that are no matrices (norms, biases) are averaged. With `scale: 1` there is nothing to
tune; more than 1 often helps where models are many.

Of models that are nearly copies, what they differ by is made as long as what they share, and the merge too strong:
1.4 times for two. `damping: 0.01` keeps it at its length; for models that differ it changes little.

`filter` says which tensors are matrices. `llm`: two-dimensional ones except embeddings, output heads, router gates
and rotary tables. `reference`: as in the authors' code, all two-dimensional ones except `text_projection`.
`fusionbench`: all two-dimensional ones. `none`: no tensor, for use in an override.

Reference: Gargiulo et al., Task Singular Vectors, CVPR 2025, https://arxiv.org/abs/2412.00081, section 4.2 (TSV-Merge).
Differs from the paper: what a model did not change, and copies of one direction, are left out before directions are
made orthogonal, where the authors' code puts arbitrary ones in their place (`null_policy: reference` does that too); a
tensor with fewer rows or columns than there are models is averaged, where theirs loses its change; embeddings are not
matrices unless `filter` says so; weights per model multiply task vectors, as in FusionBench. Whether query, key
and value are one matrix or three makes a difference, as with theirs: `fuse: qkv` makes one of three, for which the
factors are computed three times unless the run has a `--cache`.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

from mergetool.methods.base import RANK, Factored, Field, Rank, TensorGroup, Unit
from mergetool.methods.families.matrix import most_directions
from mergetool.methods.families.recovering import RecoveringMethod

if TYPE_CHECKING:
    from torch import Tensor

    from mergetool.kernels.spectral import Factors


class TsvMerge(RecoveringMethod):
    """`base + scale * U' S V'^T`, where U' and V' are the nearest orthogonal ones to all tasks' singular vectors"""

    method: Literal["tsv-merge"] = "tsv-merge"
    rank: Rank = Field("auto", description=RANK)
    null_policy: Literal["drop", "reference"] = Field(
        "drop", description="drop directions that carry nothing, or fill them arbitrarily as the authors' code does"
    )
    damping: Unit = Field(
        0.0,
        description="what near copies differ by counts as noise where it is shorter than the root of this; 0: never",
    )
    buffers: ClassVar = 22
    uses_factors: ClassVar = True
    neutral: ClassVar = {"rank": 1.0}

    @model_validator(mode="after")
    def _fills_or_damps(self) -> "TsvMerge":
        if self.damping and self.null_policy == "reference":
            raise ValueError("`damping` leaves out what `null_policy: reference` would fill: write `null_policy: drop`")
        return self

    def in_factors(self, name: str, shape: tuple[int, ...]) -> Factored:
        return "cores" if self.null_policy == "drop" else "product"  # arbitrary directions lie outside all cores

    def merged(
        self, group: TensorGroup, matrices: "list[Tensor]", weights: Sequence[float], size: int
    ) -> "Tensor | None":
        import torch

        from mergetool.kernels.spectral import concatenated, interference, orthogonalised

        if not (most := most_directions(group, self.rank, size, len(matrices))):
            return None
        parts = zip(self._factors(group, matrices, min(most, *matrices[0].shape)), weights, strict=True)
        every = concatenated([factors.scaled(weight) for factors, weight in parts])
        group.measure("interference", interference(every.to(torch.float32)).normalised)
        fill = self.null_policy == "reference"
        return orthogonalised(every, fill=fill, damping=self.damping).to(matrices[0].dtype).dense()

    def _factors(self, group: TensorGroup, matrices: "list[Tensor]", most: int) -> "list[Factors]":
        from mergetool.kernels.spectral import kept, live_factors_of, truncated_svd

        factors_of_all: Iterable[Factors]
        if self.null_policy == "reference":
            factors_of_all = [truncated_svd(matrix, most) for matrix in matrices]
        elif group.store is not None:
            factors_of_all = [group.store.factors(matrix, most) for matrix in matrices]
        else:
            factors_of_all = live_factors_of(matrices, most)
        return [kept(factors, self.rank) for factors in factors_of_all]
