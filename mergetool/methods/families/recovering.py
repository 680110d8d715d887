"""Matrix methods whose merge holds its task vectors shortened, and the factor that gives them their length back.

What orthogonalises or flattens leaves less of every task vector in the merge M: <M, D> / |D|^2 of it. With the factor
1 / mean of that over the tasks, it is all there on average. Inner products are over all merged matrices together, which
one pass counts before anything is merged; or over each matrix by itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Field, Params, Recover, Scale, StatisticsPass, Stats, TensorGroup
from mergetool.methods.families.matrix import MatrixMethod, chosen_of

if TYPE_CHECKING:
    from torch import Tensor

SCALE = (
    "factor on the merged task vector of matrices; recover: what gives task vectors their length back on average, "
    "counted over the whole model, at most 3 ({recover: tensor, cap: 2}: by tensor, at most 2); averages are left as "
    "they are then"
)
"""The description of every field of this kind."""

DEPENDS = {
    "independent": "one scale for all matrices together depends on all of them",
    "independent filter=none": None,
}
"""The law that a counted scale breaks, unless nothing is a matrix."""


class RecoveringMethod(MatrixMethod):
    """A matrix method with a scale that may be counted."""

    scale: Scale = Field(1.0, description=SCALE)
    by_tensor: ClassVar = "scale: {recover: tensor, cap: 3.0}, or a number"

    @property
    def recovery(self) -> Recover | None:
        """How the scale is counted, if it is."""
        if isinstance(self.scale, str):
            return Recover("model", 3.0)
        return self.scale if isinstance(self.scale, Recover) else None

    def params(self, depth: float, models: "tuple[str, ...]") -> Params:  # type: ignore[override]
        p = super().params(depth, models)
        return p if self.recovery is None else Params(**{**vars(p), "scale": str(self.scale)})

    def pass_scope(self) -> Literal["tensor", "model"]:
        return "model" if self.recovery is not None and self.recovery.recover == "model" else "tensor"

    def counts(self, name: str, shape: tuple[int, ...]) -> bool:
        return self.pass_scope() == "tensor" or self.granularity_in(name, shape) == "tensor"

    def statistics_pass(self, p: Params, num_elements: int, bits: int) -> StatisticsPass | None:
        return Recovery(self) if self.pass_scope() == "model" else None

    def factor(self, group: TensorGroup, p: Params, stats: Stats, update: "Tensor") -> float:
        if self.recovery is None:
            return p.scale
        if self.recovery.recover == "tensor":
            found = recovered(lengths(group, p, update).to("cpu"), self.recovery.cap)
        else:
            (found,) = stats.get("scale", (1.0,))
            group.note(f"scale {found:.3g}, counted over all matrices")
        group.measure("scale", found)
        return found

    def factor_of_averages(self, p: Params) -> float:
        return p.scale if self.recovery is None else 1.0

    def update(self, group: TensorGroup, p: Params) -> "Tensor | None":
        kept = from_shelf(group)
        return super().update(group, p) if kept is None else kept


def from_shelf(group: TensorGroup) -> "Tensor | None":
    """What a pass over the whole model has merged of this tensor, if it has been kept."""
    if group.shelf is None or (kept := group.shelf.take()) is None:
        return None
    tensor, notes = kept
    group.notes += [note for note in notes if note not in group.notes]
    return tensor.to(group.models[0].device)


@dataclass(frozen=True)
class Recovery(StatisticsPass):
    """The pass over the whole model; what it merges is kept for the merge, if there is room."""

    method: RecoveringMethod

    def observe(self, groups: Iterable[TensorGroup], p: Params) -> "Tensor":
        import torch

        total = torch.zeros(2, len(p.weight), dtype=torch.float64)
        for group in groups:
            update = MatrixMethod.update(self.method, group, p)
            if update is not None:
                total += lengths(group, p, update).to("cpu")
                if group.shelf is not None:
                    group.shelf.put(update, group.notes)
        return total

    def conclude(self, total: "Tensor") -> Stats:
        assert self.method.recovery is not None
        return {"scale": (recovered(total, self.method.recovery.cap),)}


def lengths(group: TensorGroup, p: Params, update: "Tensor") -> "Tensor":
    """<M, D> and |D|^2 of every task vector D with its weight, (2, T), float64; zeros where a model is left out."""
    import torch

    from mergetool.kernels.sums import wide_sum

    found = torch.zeros(2, len(p.weight), dtype=torch.float64, device=update.device)
    product, update = group.scratch("product"), update.view_as(group.models[0])
    for index, weight in chosen_of(p):
        delta = group.deltas[index]
        found[0, index] = weight * wide_sum(torch.mul(update, delta, out=product), group.scratch)
        found[1, index] = weight * weight * wide_sum(torch.mul(delta, delta, out=product), group.scratch)
    return found


def recovered(lengths: "Tensor", cap: float) -> float:
    """1 / the mean share of the task vectors (those that are not zero), at most `cap`; 1 where there are none."""
    live = lengths[1] > 0
    if not bool(live.any()):
        return 1.0
    share = float((lengths[0, live] / lengths[1, live]).mean())
    return min(cap, 1 / share) if share > 0 else cap
