"""What methods share that make one task vector of several, entry by entry, and drop none of them before."""

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from mergetool.methods.base import Field, Finite, Params, PerModel, Scheduled, Stats, TensorGroup, TensorMethod

if TYPE_CHECKING:
    from torch import Tensor


class DeltaMethod(TensorMethod):
    """`base + scale * combined(task vectors, each times its weight)`"""

    weight: PerModel[Finite] = Field(1.0, description="weight of each task vector")
    scale: Scheduled[Finite] = Field(1.0, description="factor on the merged task vector")
    needs_base: ClassVar = "required"
    granularity: ClassVar = "element"
    buffers: ClassVar = 4

    @abstractmethod
    def combined(self, group: TensorGroup, deltas: "list[Tensor]", p: Params) -> "Tensor":
        """One task vector of several, which may be overwritten; it may be one of them, or a temporary."""

    def change(self, group: TensorGroup, p: Params, stats: Stats) -> "tuple[Tensor, float]":
        for weight, delta in zip(p.weight, group.deltas, strict=True):
            if weight != 1.0:
                delta.mul_(weight)
        return self.combined(group, group.deltas, p), 1.0

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        merged, _ = self.change(group, p, stats)
        assert group.base is not None
        return group.base.add_(merged, alpha=p.scale)
