"""Keep each task vector's leading singular vectors, make those of different tasks orthogonal, add up.

The change that fine-tuning makes to a weight matrix has few directions that matter. TSV-Merge keeps, of every task
vector, as many as fit side by side (the smaller dimension divided by the number of models) and replaces them by the
nearest set of mutually orthogonal directions, left and right, so that no task reads what another one writes. Singular
values stay as they are. Weights that are no matrices (norms, biases) are averaged. With `scale: 1` there is nothing to
tune; more than 1 often helps where models are many.

`filter` says which tensors are matrices. `llm`: two-dimensional ones except embeddings, output heads, router gates
and rotary tables. `reference`: as in the authors' code, all two-dimensional ones except `text_projection`.
`fusionbench`: all two-dimensional ones. `none`: no tensor, for use in an override.

Reference: Gargiulo et al., Task Singular Vectors, CVPR 2025, https://arxiv.org/abs/2412.00081, section 4.2 (TSV-Merge).
Differs from the paper: what a model did not change, and copies of one direction, are left out before directions are
made orthogonal, where the authors' code puts arbitrary ones in their place (`null_policy: reference` does that too); a
tensor with fewer rows or columns than there are models is averaged, where theirs loses its change; embeddings are not
matrices unless `filter` says so; weights per model multiply task vectors, as in FusionBench. Fused projections
(query, key and value in one tensor) are merged as they are stored, and the result depends on that, as theirs does.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Discriminator, Tag

from mergetool.arch.matrices import MatrixFilter, is_matrix
from mergetool.methods.base import (
    Field,
    Finite,
    Fraction,
    Params,
    PerModel,
    Reach,
    Scheduled,
    Stats,
    TensorGroup,
    TensorMethod,
)

if TYPE_CHECKING:
    from torch import Tensor

    from mergetool.kernels.spectral import Factors


def _form(value: object) -> str:
    """Which form of `rank` a value is meant to have, so that an error is about that one only."""
    if isinstance(value, dict):
        return "by energy"
    return "share" if isinstance(value, float) else "count" if type(value) is int else "word"


Rank = Annotated[
    Annotated[Literal["auto"], Tag("word")]
    | Annotated[int, Field(strict=True, ge=1), Tag("count")]
    | Annotated[Fraction, Tag("share")]
    | Annotated[dict[Literal["energy"], Fraction], Field(min_length=1), Tag("by energy")],
    Discriminator(_form),
]


class TsvMerge(TensorMethod):
    """`base + scale * U' S V'^T`, where U' and V' are the nearest orthogonal ones to all tasks' singular vectors"""

    method: Literal["tsv-merge"] = "tsv-merge"
    scale: Scheduled[Finite] = Field(1.0, description="factor on the merged task vector (alpha in the paper)")
    weight: PerModel[Finite] = Field(1.0, description="factor on each task vector; 0 leaves the model out")
    rank: Rank = Field(
        "auto",
        description="directions kept of each task vector: auto (smaller dimension // number of models), a number, "
        "a share of the smaller dimension, or {energy: share of the squared norm}",
    )
    null_policy: Literal["drop", "reference"] = Field(
        "drop", description="drop directions that carry nothing, or fill them arbitrarily as the authors' code does"
    )
    filter: MatrixFilter = Field(
        "llm", description="which two-dimensional tensors are treated as matrices; all others are averaged"
    )
    conv: Literal["mean", "matricize"] = Field(
        "mean", description="average tensors of more than two dimensions, or treat them as (out, everything else)"
    )
    needs_base: ClassVar = "required"
    reach: ClassVar = "tensor"
    buffers: ClassVar = 22
    neutral: ClassVar = {"rank": 1.0}

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        assert group.base is not None
        parts = [(delta, weight) for delta, weight in zip(group.deltas, p.weight, strict=True) if weight]
        if not parts:
            return group.base
        update = self._spectral(group, parts) if self._is_matrix(group.name, group.shape) else None
        if update is None:
            update = group.scratch(0).zero_()
            for delta, weight in parts:
                update.add_(delta, alpha=weight / len(parts))
        return group.base.add_(update.view_as(group.base), alpha=p.scale)

    def reach_in(self, name: str, shape: tuple[int, ...]) -> Reach:
        return "tensor" if self._is_matrix(name, shape) else "element"

    def _is_matrix(self, name: str, shape: tuple[int, ...]) -> bool:
        return is_matrix(name, shape, self.filter, conv=self.conv)

    def _spectral(self, group: TensorGroup, parts: "list[tuple[Tensor, float]]") -> "Tensor | None":
        """The merged task vector as a matrix, or None where the mean has to do."""
        from mergetool.kernels.spectral import concatenated, orthogonalised

        matrices = [(delta.flatten(1), weight) for delta, weight in parts]
        most = self._most(matrices[0][0].shape, len(matrices))
        if most == 0:
            group.note("too small for the rank asked for: averaged")
            return None
        try:
            every = concatenated([self._factors(matrix * weight, most) for matrix, weight in matrices])
        except ValueError:  # the check of the result will say whose
            group.note("holds values that are not finite: averaged")
            return None
        return orthogonalised(every, fill=self.null_policy == "reference").to(group.models[0].dtype).dense()

    def _factors(self, matrix: "Tensor", most: int) -> "Factors":
        from mergetool.kernels.spectral import energy_rank, live_factors, truncated_svd

        factors = live_factors(matrix, most) if self.null_policy == "drop" else truncated_svd(matrix, most)
        if isinstance(self.rank, dict) and factors.rank:
            return factors.leading(energy_rank(factors.s, self.rank["energy"]))
        return factors

    def _most(self, shape: tuple[int, ...], num_models: int) -> int:
        """How many directions of one task vector may be kept."""
        full = min(shape)
        match self.rank:
            case "auto":
                return full // num_models
            case int():
                return min(self.rank, full)
            case float():
                return int(self.rank * full)
            case dict():
                return full
