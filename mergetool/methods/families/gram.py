"""Inner products of a tensor's vectors, one of each model: all that methods of angles and lengths need to know."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import local
from typing import TYPE_CHECKING, Literal

from mergetool.methods.base import Params, StatisticsPass, Stats, TensorGroup

if TYPE_CHECKING:
    from torch import Tensor

Per = Literal["tensor", "row", "column"]
Conclude = Callable[["Tensor", Params], Stats]

SUM = "sum of the vectors"
_RUN = 512
"""So many products are summed in the compute dtype; what they come to is added up in float64."""
_LONG, _SLICES = 1 << 18, 4
"""Up to this length, so many slices are laid side by side on a CPU at once: fewer and longer operations."""
_local = local()
_SHORT = 1 << 14
"""Slices below this have every product added up in float64: they cost nothing."""


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
    """Inner products of all vectors of a tensor, (N, N) in float64. Leaves the models as they are."""

    then: Conclude
    params: Params
    sums: bool = False
    """Whether the sum of the vectors is kept for the merge, under `SUM`."""

    def observe(self, groups: Iterable[TensorGroup], p: Params) -> "Tensor":
        import torch

        parts = [_products(group, _room_for_sum(group) if self.sums else None).to("cpu") for group in groups]
        return torch.stack(parts).sum(0)  # added up here, wherever the slices are

    def conclude(self, total: "Tensor") -> Stats:
        return self.then(total, self.params)


def _room_for_sum(group: TensorGroup) -> "Tensor | None":
    """Where the sum of a slice's vectors may wait for its merge, if there is room."""
    if group.kept is None or group.room is None or (room := group.room()) is None:
        return None
    group.kept[SUM] = room
    return room.view(-1)


def _products(group: TensorGroup, summed: "Tensor | None" = None) -> "Tensor":
    """Inner products of a slice, (N, N); the sum of its vectors goes to `summed`.

    Its vectors are laid side by side piece by piece, all of a piece in the processor's cache, where a product of
    matrices makes every inner product of a run from what it reads once.
    """
    import torch

    count, like = len(group.names), group.models[0]
    total = torch.zeros(count, count, dtype=torch.float64, device=like.device)
    for begin, vectors, whole in _side_by_side(group):
        if summed is not None:
            add_up(vectors, summed[begin : begin + vectors.shape[1]])
        if like.numel() < _SHORT:
            return gram(list(vectors), torch.empty_like(vectors[0]), "tensor")[0]
        total += _of_runs(whole.view(count, -1, _RUN).transpose(0, 1))
    return total


def _of_runs(runs: "Tensor") -> "Tensor":
    """Inner products of many runs (runs, N, length of one), (N, N)."""
    import torch

    total = torch.bmm(runs, runs.mT).sum(0, dtype=torch.float64)
    return (total + total.mT) / 2


def add_up(vectors: "Iterable[Tensor]", out: "Tensor") -> "Tensor":
    """The sum of vectors, one after the other."""
    import torch

    first, second, *others = vectors
    torch.add(first, second, out=out)
    for vector in others:
        out.add_(vector)
    return out


def _room(group: TensorGroup, count: int) -> "Tensor":
    """Where vectors of a slice are laid side by side; how long it is depends on the slice alone, as sums do on it."""
    like = group.models[0]
    length, least = like.numel(), count * _RUN
    if length < _SHORT:
        return like.new_empty(count * -(-length // _RUN) * _RUN)
    if like.device.type == "cpu" and length <= _LONG:
        return _own_room(like, max(least, _SLICES * length))
    return group.scratch("vectors").reshape(-1) if length >= least else like.new_empty(least)


def _own_room(like: "Tensor", size: int) -> "Tensor":
    """So many entries that this thread keeps between slices."""
    kept = vars(_local)
    name = str(like.dtype)
    if name not in kept or len(kept[name]) < size:
        kept[name] = like.new_empty(size)
    room: Tensor = kept[name][:size]
    return room


def _side_by_side(group: TensorGroup) -> "Iterator[tuple[int, Tensor, Tensor]]":
    """Pieces of all vectors of a slice: where each begins, the vectors (N, length), and with zeros up to whole runs.

    Vectors are task vectors where there is a base.
    """
    import torch

    models = [model.reshape(-1) for model in group.models]
    base = None if group.base is None else group.base.reshape(-1)
    count, length = len(models), len(models[0])
    room = _room(group, count)
    piece = min(len(room) // count // _RUN, -(-length // _RUN)) * _RUN
    for begin in range(0, length, piece):
        size = min(piece, length - begin)
        whole = room[: count * piece].view(count, piece)[:, : -(-size // _RUN) * _RUN]
        whole[:, size:].zero_()
        vectors = whole[:, :size]
        for model, vector in zip(models, vectors, strict=True):
            there = model[begin : begin + size]
            vector.copy_(there) if base is None else torch.sub(there, base[begin : begin + size], out=vector)
        yield begin, vectors, whole
