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
    return _matrices(torch.stack(pairs, 1), len(vectors))


def _matrices(pairs: "Tensor", count: int) -> "Tensor":
    """Symmetric matrices (K, N, N) from their lower halves (K, N (N + 1) / 2), row after row."""
    import torch

    rows, columns = torch.tril_indices(count, count, device=pairs.device)
    matrices = pairs.new_empty(len(pairs), count, count)
    matrices[:, rows, columns] = matrices[:, columns, rows] = pairs
    return matrices


@dataclass(frozen=True)
class Gram(StatisticsPass):
    """Inner products of all vectors of a tensor, (N, N) in float64."""

    then: Conclude
    params: Params

    def observe(self, groups: Iterable[TensorGroup], p: Params) -> "Tensor":
        import torch

        parts = []
        for group in groups:
            count, pairs = len(group.models), _pairs(group)
            parts.append(pairs.to("cpu"))
        return _matrices(torch.stack(parts).sum(0)[None], count)[0]  # added up here, wherever the slices are

    def conclude(self, total: "Tensor") -> Stats:
        return self.then(total, self.params)


def _pairs(group: TensorGroup) -> "Tensor":
    """Inner products of a slice, the lower half of their matrix, row after row."""
    import torch

    from mergetool.kernels.sums import wide_sum

    vectors, product = vectors_of(group), group.scratch("product")
    return torch.stack(
        [
            wide_sum(torch.mul(first, second, out=product), group.scratch)
            for i, first in enumerate(vectors)
            for second in vectors[: i + 1]
        ]
    )
