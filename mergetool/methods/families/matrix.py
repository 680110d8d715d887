"""Methods that look at weight matrices as maps between feature spaces: what they share."""

from abc import abstractmethod
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.arch.matrices import MatrixFilter, is_matrix, query_key_value
from mergetool.methods.base import (
    Factored,
    Field,
    Finite,
    Granularity,
    Params,
    PerModel,
    Rank,
    Scheduled,
    Stats,
    TensorGroup,
    TensorMethod,
)

if TYPE_CHECKING:
    from torch import Tensor


class MatrixMethod(TensorMethod):
    """A method that merges weight matrices by their singular vectors, and averages the task vectors of the rest."""

    weight: PerModel[Finite] = Field(1.0, description="factor on each task vector; 0 leaves the model out")
    filter: MatrixFilter = Field(
        "llm", description="which two-dimensional tensors are treated as matrices; all others are averaged"
    )
    conv: Literal["mean", "matricize"] = Field(
        "mean", description="average tensors of more than two dimensions, or treat them as (out, everything else)"
    )
    fuse: Literal["none", "qkv"] = Field(
        "none",
        description="merge query, key and value projections of a block as one matrix (as models with a fused one do)",
    )
    needs_base: ClassVar = "required"
    granularity: ClassVar = "tensor"
    buffers: ClassVar = 16

    @abstractmethod
    def merged(
        self, group: TensorGroup, matrices: "list[Tensor]", weights: Sequence[float], size: int
    ) -> "Tensor | None":
        """The merged task vector (m, n), in any dtype, of these (finite, weights not 0), or None where the mean has
        to do. The matrices stay as they are. They may be cores of larger ones: `size` is the smaller dimension of
        those."""

    def needs_weights(self) -> str | None:
        return None if self.fuse == "none" else "`fuse: qkv` lays whole weights together; write `fuse: none`"

    def in_factors(self, name: str, shape: tuple[int, ...]) -> Factored:
        return "cores"

    @property
    def needs_float64(self) -> bool:
        return self.filter != "none"

    def granularity_in(self, name: str, shape: tuple[int, ...]) -> Granularity:
        return "tensor" if is_matrix(name, shape, self.filter, conv=self.conv) else "element"

    def treatment(self, name: str, shape: tuple[int, ...]) -> str:
        """What this tensor is treated with, in a word: only matrices get what the method is called by."""
        return str(self.method_name()) if self.granularity_in(name, shape) == "tensor" else "average"

    def partners(self, name: str) -> tuple[str, ...]:
        return tuple(other for other in query_key_value(name) if other != name) if self.fuse == "qkv" else ()

    def change(self, group: TensorGroup, p: Params, stats: Stats) -> "tuple[Tensor, float] | None":
        if not isinstance(vars(p)["scale"], float | int) or not chosen_of(p):
            return None
        return self._update_or_mean(group, p)[0], 1.0

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        assert group.base is not None
        if not chosen_of(p):
            return group.base
        update, matrix = self._update_or_mean(group, p)
        scale = self.factor(group, p, stats, update) if matrix else self.factor_of_averages(p)
        return group.base.add_(update, alpha=scale)

    def _update_or_mean(self, group: TensorGroup, p: Params) -> "tuple[Tensor, bool]":
        """What is to be added, and whether it is the merged task vector of a matrix."""
        chosen, update = chosen_of(p), self.update(group, p)
        if update is not None:
            return update.view_as(group.models[0]), True
        mean = group.scratch("update").zero_()
        for index, weight in chosen:
            mean.add_(group.deltas[index], alpha=weight / len(chosen))
        return mean, False

    def factor(self, group: TensorGroup, p: Params, stats: Stats, update: "Tensor") -> float:
        """What a merged matrix is multiplied by."""
        return p.scale

    def factor_of_averages(self, p: Params) -> float:
        """What averages are multiplied by."""
        return p.scale

    def update(self, group: TensorGroup, p: Params) -> "Tensor | None":
        """The merged task vector of a matrix (m, n), in compute dtype; None where the mean has to do.

        With partners it is the tensor's share of what is merged of all of them.
        """
        import torch

        from mergetool.kernels.subspace import searching

        if self.granularity_in(group.name, group.shape) != "tensor" or not (chosen := chosen_of(p)):
            return None
        members = [group]
        if group.other is not None and (partners := self.partners(group.name)):
            every = [group if n == group.name else group.other(n) for n in sorted((group.name, *partners))]
            members = [member for member in every if member is not None]
        blocks = [[member.deltas[index].flatten(1) for member in members] for index, _ in chosen]
        matrices = [torch.cat(each) if len(each) > 1 else each[0] for each in blocks]
        if not all(bool(matrix.isfinite().all()) for matrix in matrices):  # the check of the result will say whose
            group.note("holds values that are not finite: averaged")
            return None
        size = min(sum(member.shape[0] for member in members), prod(group.shape[1:]))
        with searching() as searches:
            update = self.merged(group, matrices, [weight for _, weight in chosen], size)
        for told in searches.notes:
            group.note(told)
        before = sum(member.shape[0] for member in members[: members.index(group)])
        dtype = group.models[0].dtype
        return None if update is None else update[before : before + len(group.models[0])].to(dtype)


class ScaledMatrixMethod(MatrixMethod):
    """One whose merged task vectors have the right length by themselves."""

    scale: Scheduled[Finite] = Field(1.0, description="factor on the merged task vector")


def chosen_of(p: Params) -> list[tuple[int, float]]:
    """Place and weight of every model that is not left out."""
    return [(index, weight) for index, weight in enumerate(p.weight) if weight]


def weighted(matrices: "Sequence[Tensor]", weights: Sequence[float]) -> "list[Tensor]":
    """Each matrix times its weight; not to be changed, as those of weight 1 are the matrices themselves."""
    return [matrix if weight == 1 else matrix * weight for matrix, weight in zip(matrices, weights, strict=True)]


def most_directions(group: TensorGroup, rank: Rank, size: int, num_tasks: int) -> int:
    """How many directions of each task are kept at most; where that is none, a note says so."""
    from mergetool.kernels.spectral import rank_limit

    most = rank_limit(rank, size, num_tasks)
    if most == 0:
        group.note("too small for the rank asked for: averaged")
    return most
