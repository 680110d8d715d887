"""Give what merging changed the length that the models' changes have on average.

Averages and votes make task vectors shorter: of n that have nothing in common the mean is shorter by the root of n.
Each tensor of the merged task vector (of the merged weights, where the recipe has no base) is multiplied by the mean
norm of the models' over its own; with `axis: row`, each row. The average of one model stays as it is.

Reference: none (what interpolation on a sphere does for two models, done for any method).
Differs from the paper: nothing.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.then import After, Field, Granularity, Params, TensorGroup, changes

if TYPE_CHECKING:
    from torch import Tensor


class MatchNorm(After):
    """`change * mean_i ||change_i|| / ||change||`"""

    step: Literal["match-norm"] = "match-norm"
    axis: Literal["tensor", "row"] = Field("tensor", description="what has one factor: a tensor, or each of its rows")
    buffers: ClassVar = 3

    @property
    def counts(self) -> bool:
        return self.axis == "tensor"

    def granularity_in(self, name: str, shape: tuple[int, ...]) -> Granularity:
        return "row" if self.axis == "row" and len(shape) > 1 else "element" if self.counts else "tensor"

    def look(self, group: TensorGroup, p: Params) -> "Tensor | None":
        import torch

        return torch.stack([self._squares(change, group) for change in changes(group)])

    def count(self, seen: "Tensor | None", change: "Tensor", group: TensorGroup, p: Params) -> "Tensor":
        import torch

        assert seen is not None
        return torch.cat((seen, self._squares(change, group).view(1)))

    def apply(self, change: "Tensor", seen: "Tensor | None", group: TensorGroup, p: Params) -> "Tensor":
        import torch

        assert seen is not None
        own = seen[-1] if self.counts else self._squares(change, group)
        target = (seen[:-1] if self.counts else seen).sqrt().mean(0)
        factors = torch.where(own > 0, target / own.sqrt(), 1.0)
        if self.counts:
            group.measure("match-norm factor", float(factors))
        if factors.dim() == 0:
            return change.mul_(float(factors))
        return change.mul_(factors.to(change.dtype).view(-1, *(1 for _ in change.shape[1:])))

    def _squares(self, values: "Tensor", group: TensorGroup) -> "Tensor":
        """Sums of squares (float64): of all, or of each row."""
        import torch

        wide = group.scratch("then wide", torch.float64).copy_(values).square_()
        return wide.sum() if self.counts or wide.dim() < 2 else wide.flatten(1).sum(1)
