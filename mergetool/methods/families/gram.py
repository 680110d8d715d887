"""Inner products of a tensor's vectors, one of each model: all that methods of angles and lengths need to know."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mergetool.methods.base import Params, StatisticsPass, Stats, TensorGroup

if TYPE_CHECKING:
    from torch import Tensor

Per = Literal["tensor", "row", "column"]
Conclude = Callable[["Tensor", Params], Stats]


def vectors_of(group: TensorGroup) -> "list[Tensor]":
    """Task vectors where there is a base, else the models."""
    return group.models if group.base is None else group.deltas


def gram(vectors: "Sequence[Tensor]", product: "Tensor", per: Per) -> "Tensor":
    """Inner products (K, N, N) in float64: K is 1, or one for each row (index of the first axis) or column (each entry
    of a row). A tensor of one axis is one row, and one column. `product` is overwritten."""
    import torch

    shape = (1, -1) if per == "tensor" or product.dim() < 2 else (len(product), -1)
    axis = 0 if per == "column" and product.dim() > 1 else 1
    pairs = [
        torch.mul(first, second, out=product).reshape(shape).sum(axis, dtype=torch.float64)
        for i, first in enumerate(vectors)
        for second in vectors[: i + 1]
    ]
    products = torch.zeros(len(pairs[0]), len(vectors), len(vectors), dtype=torch.float64, device=product.device)
    places = [(i, j) for i in range(len(vectors)) for j in range(i + 1)]
    for (i, j), values in zip(places, pairs, strict=True):
        products[:, i, j] = products[:, j, i] = values
    return products


@dataclass(frozen=True)
class Gram(StatisticsPass):
    """Inner products of all vectors of a tensor, (N, N) in float64."""

    then: Conclude
    params: Params

    def observe(self, groups: Iterable[TensorGroup], p: Params) -> "Tensor":
        import torch

        parts = [gram(vectors_of(group), group.scratch("product"), "row").sum(0).to("cpu") for group in groups]
        return torch.stack(parts).sum(0)  # added up here, wherever the slices are

    def conclude(self, total: "Tensor") -> Stats:
        return self.then(total, self.params)
