"""Shrink what merging changed in the first layers, and less so in the later ones.

Early layers hold what all tasks share, and merging disturbs it most; late layers hold what a task needs. LiNeS
multiplies the merged task vector of layer l of L by `first + (last - first) l / (L - 1)`. It costs nothing, and goes
with any method; `{first: 1, last: 1}` changes nothing. `balance: true` divides by how much shorter than the sum of task
vectors the merged one is, which matters after methods that elect signs.

Reference: Wang et al., LiNeS: post-training layer scaling prevents forgetting and enhances model merging, ICLR 2025,
https://arxiv.org/abs/2410.17146, section 4.
Differs from the paper: `balance` (its ratio of L1 norms over the number of models) is taken tensor by tensor, not once
for the whole model. Tensors outside the layers get `first`, as there; `match` leaves them out.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.then import After, Field, Finite, Params, TensorGroup, changes

if TYPE_CHECKING:
    from torch import Tensor


class Lines(After):
    """`change * (first + (last - first) * depth)`"""

    step: Literal["lines"] = "lines"
    first: Finite = Field(description="factor on the change of the first layer, and of all outside the layers")
    last: Finite = Field(description="factor on the change of the last layer; linear in between")
    balance: bool = Field(
        False,
        strict=True,
        description="also multiply by the L1 norm of the sum of task vectors over that of the merged one, and divide "
        "by the number of models",
    )
    needs_base: ClassVar = True
    buffers: ClassVar = 3

    def numbers(self, depth: float) -> dict[str, float]:
        return {"factor": self.first + (self.last - self.first) * depth}

    @property
    def counts(self) -> bool:
        return self.balance

    @property
    def scales(self) -> bool:
        return not self.balance

    def look(self, group: TensorGroup, p: Params) -> "Tensor | None":
        from mergetool.kernels.sums import wide_sum

        if not self.balance:
            return None
        total = group.scratch("then sum").zero_()
        for change in changes(group):
            total.add_(change)
        return wide_sum(total.abs_(), group.scratch).view(1)

    def count(self, seen: "Tensor | None", change: "Tensor", group: TensorGroup, p: Params) -> "Tensor":
        import torch

        from mergetool.kernels.sums import wide_sum

        assert seen is not None
        own = torch.abs(change, out=group.scratch("then sum"))
        return torch.cat((seen, wide_sum(own, group.scratch).view(1)))

    def apply(self, change: "Tensor", seen: "Tensor | None", group: TensorGroup, p: Params) -> "Tensor":
        factor = p.factor
        if seen is not None:
            whole, merged = seen.tolist()
            factor *= whole / merged / len(group.models) if merged else 1.0
            group.measure("lines factor", factor)
        return change if factor == 1.0 else change.mul_(factor)
