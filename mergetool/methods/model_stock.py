"""Move from the base towards the mean of fine-tunes, as far as their task vectors agree.

Fine-tunes of one base lie around a centre that generalises better than any of them. How far it is from their mean
towards the base follows from the angle between their task vectors alone: with cosine c between N of them, the centre's
nearest point on the way is `base + t * (mean - base)` with `t = N c / (1 + (N - 1) c)`. Two models are enough to tell.

Reference: Jang et al., Model Stock: All we need is just a few fine-tuned models, ECCV 2024,
https://arxiv.org/abs/2403.19522, section 4, equations 3 and 4.
Differs from the paper: with more than two models c is the mean over all pairs, as the authors suggest; inner products
are summed in float64 and compared as they are, where others add a constant to norms and lose small task vectors. Where
task vectors disagree on the whole (c below 0, of which the paper does not speak) nothing is left of them: t is 0. A
model that leaves a tensor as it was agrees with nobody. `per: row` takes an angle for each row of a matrix.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Field, Granularity, Params, StatisticsPass, Stats, TensorGroup, TensorMethod

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Gram(StatisticsPass):
    """Inner products of all task vectors, (N, N) in float64."""

    def observe(self, groups: Iterable[TensorGroup], p: Params) -> "Tensor":
        import torch

        parts = [_gram(group).sum(0).to("cpu") for group in groups]  # added up here, wherever the slice is
        return torch.stack(parts).sum(0)

    def conclude(self, total: "Tensor") -> Stats:
        return {"share": tuple(_share(total[None]).tolist())}


class ModelStock(TensorMethod):
    """`base + t * (mean - base)`, t from the angle between task vectors"""

    method: Literal["model-stock"] = "model-stock"
    per: Literal["tensor", "row"] = Field("tensor", description="one angle for a tensor, or one for each of its rows")
    needs_base: ClassVar = "required"
    min_models: ClassVar = 2
    granularity: ClassVar = "row"
    buffers: ClassVar = 2
    pass_depends_on: ClassVar = ()

    @property
    def needs_float64(self) -> bool:
        return True

    def granularity_in(self, name: str, shape: tuple[int, ...]) -> Granularity:
        return "row" if self.per == "row" else "element"

    def statistics_pass(self, p: Params, num_elements: int, bits: int) -> StatisticsPass | None:
        return _Gram() if self.per == "tensor" else None

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        import torch

        assert group.base is not None
        shares = _share(_gram(group)) if self.per == "row" else torch.tensor(stats["share"], dtype=torch.float64)
        if len(shares) == 1:
            group.measure("share of the mean", float(shares))
        total = group.scratch("total").zero_()
        for delta in group.deltas:
            total.add_(delta)
        factors = (shares / len(group.deltas)).to(total)
        return group.base.add_(total.view(len(factors), -1).mul_(factors[:, None]).view_as(total))


def _gram(group: TensorGroup) -> "Tensor":
    """Inner products of the task vectors' rows, (rows, N, N) in float64; a slice of one axis is one row."""
    import torch

    rows = 1 if group.models[0].dim() < 2 else len(group.models[0])
    count = len(group.deltas)
    found = torch.zeros(rows, count, count, dtype=torch.float64, device=group.models[0].device)
    product = group.scratch("product")
    for i, first in enumerate(group.deltas):
        for j, second in enumerate(group.deltas[: i + 1]):
            found[:, i, j] = torch.mul(first, second, out=product).reshape(rows, -1).sum(1, dtype=torch.float64)
            found[:, j, i] = found[:, i, j]
    return found


def _share(gram: "Tensor") -> "Tensor":
    """t of every row, from inner products (rows, N, N)."""
    import torch

    norms = gram.diagonal(dim1=1, dim2=2).sqrt()
    lengths = norms[:, :, None] * norms[:, None, :]
    cosines = torch.where(lengths > 0, gram / lengths.where(lengths > 0, torch.ones_like(lengths)), 0.0)
    count = gram.shape[1]
    pairs = torch.triu(torch.ones(count, count, dtype=torch.bool, device=gram.device), 1)
    cosine = cosines[:, pairs].mean(1).clamp(0.0, 1.0)
    return count * cosine / (1.0 + (count - 1) * cosine)
