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
    Scheduled,
    Stats,
    TensorGroup,
    TensorMethod,
)

if TYPE_CHECKING:
    from torch import Tensor


class MatrixMethod(TensorMethod):
    """A method that merges weight matrices by their singular vectors, and averages the task vectors of the rest."""

    scale: Scheduled[Finite] = Field(1.0, description="factor on the merged task vector (alpha in the paper)")
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
        to do. The matrices may be overwritten only if it is not None. They may be cores of larger ones: `size` is the
        smaller dimension of those."""

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
        assert group.base is not None
        chosen = [(index, weight) for index, weight in enumerate(p.weight) if weight]
        if not chosen:
            return None
        update = None
        if self.granularity_in(group.name, group.shape) == "tensor":
            update = self._merged_matrix(group, chosen)
        if update is None:
            update = group.scratch("update").zero_()
            for index, weight in chosen:
                update.add_(group.deltas[index], alpha=weight / len(chosen))
        return update.to(group.base.dtype).view_as(group.base), 1.0

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        assert group.base is not None
        found = self.change(group, p, stats)
        return group.base if found is None else group.base.add_(found[0], alpha=p.scale)

    def _merged_matrix(self, group: TensorGroup, chosen: Sequence[tuple[int, float]]) -> "Tensor | None":
        """The tensor's share of the merged task vector of it and its partners, or None where the mean has to do."""
        import torch

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
        update = self.merged(group, matrices, [weight for _, weight in chosen], size)
        before = sum(member.shape[0] for member in members[: members.index(group)])
        return None if update is None else update[before : before + len(group.models[0])]
