"""Merge models one after the other, each only where the ones before it have left room: for skills that come in a row.

A new task vector is added to the sum of those before it without what it has in common with them: nothing in the
directions that hold `share` of that sum's strength, and nothing along any of its other directions. So what has been
merged stays, however many come later, and a merge can go on from a merge. In the end the merged task vector is made as
long as the models' own are on average. Weights that are no matrices (norms, biases) are added up. The order of the
models matters.

Reference: Tang et al., Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model
Merging, NeurIPS 2025, https://arxiv.org/abs/2501.09522, section 4 (OPCM). `share` is the authors'.
Differs from the paper: all models are merged in one go, which gives the same (their factors after each model cancel but
for the last one); directions that carry nothing are not closed, where the authors' code closes arbitrary ones;
embeddings are not matrices unless `filter` says so; `scope: tensor` makes every tensor as long as the models' are.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Field, Params, StatisticsPass, Stats, TensorGroup, Unit
from mergetool.methods.families.matrix import MatrixMethod, ScaledMatrixMethod, chosen_of
from mergetool.methods.families.recovering import from_shelf
from mergetool.methods.families.scope import ScopedMethod

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Lengths(StatisticsPass):
    """Squared norms of the merged task vector, and of each model's."""

    method: "Opcm"

    def observe(self, groups: Iterable[TensorGroup], p: Params) -> "Tensor":
        import torch

        total = torch.zeros(1 + len(p.weight), dtype=torch.float64)
        for group in groups:
            merged = self.method.gathered(group, p)
            total += _squares(group, p, merged)
            if group.shelf is not None and self.method.granularity_in(group.name, group.shape) == "tensor":
                group.shelf.put(merged, group.notes)
        return total

    def conclude(self, total: "Tensor") -> Stats:
        return {"factor": (_factor(total),)}


class Opcm(ScaledMatrixMethod, ScopedMethod):
    """`base + scale * mean |D_i| / |R| * R`, where R adds to itself what each task vector D_i has outside of it"""

    method: Literal["opcm"] = "opcm"
    share: Unit = Field(0.5, description="of the strength of what is merged: directions closed to later models")
    scope: Literal["tensor", "model"] = Field("model", description="what is made as long as in the models")
    buffers: ClassVar = 20
    neutral: ClassVar = {"filter": "none"}
    exempt: ClassVar = {
        **ScopedMethod.alike,
        "order": "later models are merged where earlier ones have left room",
        "order filter=none": None,
    }

    @property
    def needs_float64(self) -> bool:
        return True

    def needs_weights(self) -> str | None:
        return MatrixMethod.needs_weights(self) or ScopedMethod.needs_weights(self)

    def treatment(self, name: str, shape: tuple[int, ...]) -> str:
        return "opcm" if self.granularity_in(name, shape) == "tensor" else "sum"

    def counts(self, name: str, shape: tuple[int, ...]) -> bool:
        return self.scope == "model" or self.granularity_in(name, shape) != "tensor"

    def statistics_pass(self, p: Params, num_elements: int, bits: int) -> StatisticsPass | None:
        return _Lengths(self)

    def merged(self, group: TensorGroup, matrices: "list[Tensor]", weights: Sequence[float], size: int) -> "Tensor":
        import torch

        from mergetool.kernels.outside import outside

        total = matrices[0].to(torch.float64) * weights[0]
        for matrix, weight in zip(matrices[1:], weights[1:], strict=True):
            total = total + outside(matrix * weight, total.to(matrix.dtype), self.share)
        return total

    def gathered(self, group: TensorGroup, p: Params) -> "Tensor":
        """What is merged of a tensor, before it is given its length."""
        merged = from_shelf(group)
        if merged is None:
            merged = self.update(group, p)
        if merged is None:
            merged = group.scratch("update").zero_()
            for index, weight in chosen_of(p):
                merged.add_(group.deltas[index], alpha=weight)
        return merged.view_as(group.models[0])

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        merged = self.gathered(group, p)
        found = stats["factor"][0] if "factor" in stats else _factor(_squares(group, p, merged))
        assert group.base is not None
        return group.base.add_(merged, alpha=p.scale * found)


def _squares(group: TensorGroup, p: Params, merged: "Tensor") -> "Tensor":
    """Squared norms of what is merged, and of each task vector with its weight: (1 + N,), on the CPU."""
    import torch

    from mergetool.kernels.sums import squared_norms

    weights = torch.tensor([1.0, *p.weight], dtype=torch.float64)
    return weights.square() * squared_norms((merged, *group.deltas), group.scratch("product"), group.scratch)


def _factor(squares: "Tensor") -> float:
    """The mean length of the task vectors that have one, by that of what is merged."""
    merged, *each = squares.sqrt().tolist()
    lengths = [length for length in each if length > 0.0]
    found = sum(lengths) / len(lengths) / merged if merged > 0.0 and lengths else 1.0
    return found if math.isfinite(found) else 1.0  # the check of the result will say whose value is not
