"""Move from the base towards the mean of fine-tunes, as far as their task vectors agree.

Fine-tunes of one base lie around a centre that generalises better than any of them. How far it is from their mean
towards the base follows from the angle between their task vectors alone: with cosine c between N of them, the centre's
nearest point on the way is `base + t * (mean - base)` with `t = N c / (1 + (N - 1) c)`. Two models are enough to tell.

Reference: Jang et al., Model Stock: All we need is just a few fine-tuned models, ECCV 2024,
https://arxiv.org/abs/2403.19522, section 4, equations 3 and 4.
Differs from the paper: with more than two models c is the mean over all pairs, as the authors suggest; inner products
are summed in float64 (of long tensors, those of runs of 512 entries) and compared as they are, where others add a
constant to norms and lose small task vectors. Where task vectors disagree on the whole (c below 0, of which the paper
does not speak) nothing is left of them: t is 0. A model that leaves a tensor as it was agrees with nobody. `per: row`
takes an angle for each row of a matrix.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import (
    Factored,
    Field,
    Granularity,
    Params,
    StatisticsPass,
    Stats,
    TensorGroup,
    TensorMethod,
)
from mergetool.methods.families.gram import SUM, Gram, add_up, gram

if TYPE_CHECKING:
    from torch import Tensor


class ModelStock(TensorMethod):
    """`base + t * (mean - base)`, t from the angle between task vectors"""

    method: Literal["model-stock"] = "model-stock"
    per: Literal["tensor", "row"] = Field("tensor", description="one angle for a tensor, or one for each of its rows")
    clamp: bool = Field(
        True, strict=True, description="whether task vectors that disagree leave the base; false: go away from the mean"
    )
    needs_base: ClassVar = "required"
    min_models: ClassVar = 2
    granularity: ClassVar = "row"
    buffers: ClassVar = 4
    pass_depends_on: ClassVar = ()
    recalls: ClassVar = True

    @property
    def needs_float64(self) -> bool:
        return True

    def granularity_in(self, name: str, shape: tuple[int, ...]) -> Granularity:
        return "row" if self.per == "row" else "element"

    def in_factors(self, name: str, shape: tuple[int, ...]) -> Factored:
        return "inputs" if self.per == "row" else "cores"

    def statistics_pass(self, p: Params, num_elements: int, bits: int) -> StatisticsPass | None:
        return Gram(self.found, p, sums=True) if self.per == "tensor" else None

    def found(self, total: "Tensor", p: Params) -> Stats:
        """What the inner products of whole tensors come to."""
        return {"share": tuple(self._share(total[None]).tolist())}

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        import torch

        assert group.base is not None
        if self.per == "row":
            shares = self._share(gram(group.deltas, group.scratch("product"), "row"))
        else:
            shares = torch.tensor(stats["share"], dtype=torch.float64)
        if len(shares) == 1:
            group.measure("share of the mean", float(shares))
        kept = None if group.kept is None else group.kept.get(SUM)
        total = add_up(group.deltas, group.models[0]) if kept is None else kept
        factors = (shares / len(group.names)).to(total)
        return group.base.add_(total.view(len(factors), -1).mul_(factors[:, None]).view_as(total))

    def _share(self, products: "Tensor") -> "Tensor":
        return _share(products, clamp=self.clamp)


def _share(gram: "Tensor", *, clamp: bool) -> "Tensor":
    """t of every row, from inner products (rows, N, N)."""
    import torch

    norms = gram.diagonal(dim1=1, dim2=2).sqrt()
    lengths = norms[:, :, None] * norms[:, None, :]
    cosines = torch.where(lengths > 0, gram / lengths.where(lengths > 0, torch.ones_like(lengths)), 0.0)
    count = gram.shape[1]
    pairs = torch.triu(torch.ones(count, count, dtype=torch.bool, device=gram.device), 1)
    cosine = cosines[:, pairs].mean(1).clamp(0.0 if clamp else -1.0, 1.0)
    divisor = 1.0 + (count - 1) * cosine
    return torch.where(divisor.abs() < 1e-6, 0.0, count * cosine / torch.where(divisor == 0, 1.0, divisor))
