"""The numbers of a changed tensor, slice by slice, in float32.

A slice of rows costs one small matrix product; nothing of the size of a tensor is ever formed. DoRA divides by the
length of every row, or, where the stored weight is transposed, of every column: those lengths take one pass over the
tensor and are kept.

Reference: Liu et al., DoRA, https://arxiv.org/abs/2402.09353, section 4.1: `W' = m (W + s B A) / |W + s B A|`.
Differs from the paper: nothing (PEFT's axes: outputs of a layer, columns of an embedding), but that rows of zeros stay.
"""

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING

from mergetool.checkpoints.adapters.changes import Added, Block, Change, LowRank, Magnitude, Rows
from mergetool.tensors.dtypes import torch_dtype
from mergetool.tensors.factors import Halves
from mergetool.tensors.io import bytes_of
from mergetool.tensors.source import ModelSource

if TYPE_CHECKING:
    from torch import Tensor

_KEPT_ELEMENTS = 8 << 20
"""What is kept of factors that are read again for every slice."""
_PASS_ELEMENTS = 1 << 20


class Arithmetic:
    """Reads the tensors that an adapter changes. Safe for any number of threads."""

    def __init__(self, model: ModelSource, adapter: ModelSource) -> None:
        self._model = model
        self._adapter = adapter
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._num_kept = 0
        self._scales: dict[str, Tensor] = {}
        self._lock = Lock()
        self._pass_lock = Lock()

    def read(self, change: Change, start: int, out: "Tensor") -> None:
        """Fill `out` (float32, one axis) with elements of the changed tensor, from element `start`."""
        import torch

        stop = start + len(out)
        if change.magnitude is None:
            self._sum(change, start, out)
        else:
            first, last = start // change.width, -(-stop // change.width)
            rows = torch.empty((last - first) * change.width)
            self._sum(change, first * change.width, rows)
            scaled = rows.view(-1, change.width).mul_(self._scale(change, change.magnitude, first, rows))
            out.copy_(scaled.view(-1)[start - first * change.width :][: len(out)])
        for rows_of_tokens in change.rows:
            self._put_rows(rows_of_tokens, change.width, start, out)

    def _sum(self, change: Change, start: int, out: "Tensor") -> None:
        """`W + s B A`, elements from `start`."""
        source = self._adapter if change.is_own else self._model
        out.copy_(_elements(source, change.origin, start, len(out)))
        self.add(change, start, out)

    def add(self, change: Change, start: int, out: "Tensor") -> None:
        """Add the terms of a change to elements (float32, one axis) from `start`."""
        first, last = start // change.width, -(-(start + len(out)) // change.width)
        for term in change.terms:
            if isinstance(term, Added):
                delta = _elements(self._adapter, term.own, start, len(out)).float()
            else:
                delta = self._product(change, term, first, last).reshape(-1)[start - first * change.width :]
            out.add_(delta[: len(out)], alpha=term.factor)

    # ------------------------------------------------------------------ low-rank products

    def halves(self, change: Change, term: LowRank) -> Halves:
        """B and A of one matrix, as the tensor stores their product; the factor is in B."""
        a, b = self.matrix(term.a), self.matrix(term.b)
        if term.block is not None:
            rows = slice(term.block.first, term.block.first + change.shape[0])
            a = a.view(term.block.count, -1, a.shape[1])[term.block.index]
            b = b.view(b.shape[0], -1, term.block.count)[rows, :, term.block.index]
        left, right = (a.mT, b.mT) if term.transposed else (b, a)
        return left * term.factor, right

    def _product(self, change: Change, term: LowRank, first: int, last: int) -> "Tensor":
        """Rows [first, last) of B A, or of its transpose, as the tensor stores it."""
        if term.block is not None:
            return self._product_of_experts(change, term, term.block, first, last)
        if term.transposed:  # (in, r) @ (r, out)
            return self.matrix(term.a).mT[first:last] @ self.matrix(term.b).mT
        return self._rows(term.b, first, last) @ self.matrix(term.a)

    def _product_of_experts(self, change: Change, term: LowRank, block: Block, first: int, last: int) -> "Tensor":
        import torch

        a, b = self.matrix(term.a), self.matrix(term.b)
        a = a.view(block.count, -1, a.shape[1])  # (experts, r, in)
        b = b.view(b.shape[0], -1, block.count)  # (out, r, experts)
        if block.index is not None:
            return b[block.first + first : block.first + last, :, block.index] @ a[block.index]
        height = change.shape[1]
        products = []
        for expert in range(first // height, -(-last // height)):
            top, end = max(first - expert * height, 0), min(last - expert * height, height)
            left, right = (a[expert].mT, b[..., expert].mT) if term.transposed else (b[..., expert], a[expert])
            products.append(left[top:end] @ right)
        return torch.cat(products)

    # ------------------------------------------------------------------ magnitudes, tokens

    def _scale(self, change: Change, magnitude: Magnitude, first: int, rows: "Tensor") -> "Tensor":
        """Magnitude over length: a column for rows of the matrix, or one row for all its columns."""
        import torch

        wanted = self.matrix(magnitude.own).reshape(-1)
        if magnitude.by_row:
            lengths = torch.linalg.vector_norm(rows.view(-1, change.width), dim=1)
            return _over(wanted[first : first + len(lengths)], lengths).unsqueeze(1)
        with self._pass_lock:
            if change.name not in self._scales:
                self._scales[change.name] = _over(wanted, self._column_lengths(change))
        return self._scales[change.name]

    def _column_lengths(self, change: Change) -> "Tensor":
        import torch

        height = change.shape[0]
        step = max(1, _PASS_ELEMENTS // change.width)
        squares = torch.zeros(change.width, dtype=torch.float64)
        for first in range(0, height, step):
            rows = torch.empty((min(first + step, height) - first) * change.width)
            self._sum(change, first * change.width, rows)
            squares += rows.view(-1, change.width).double().square().sum(0)
        return squares.sqrt().float()

    def _put_rows(self, rows: Rows, width: int, start: int, out: "Tensor") -> None:
        stop = start + len(out)
        inside = [
            (place, row) for place, row in enumerate(rows.indices) if row * width < stop and start < (row + 1) * width
        ]
        if not inside:
            return
        values = self.matrix(rows.own)
        for place, row in inside:
            begin, end = max(row * width, start), min((row + 1) * width, stop)
            out[begin - start : end - start] = values[place, begin - row * width : end - row * width]

    # ------------------------------------------------------------------ the adapter's tensors

    def matrix(self, name: str) -> "Tensor":
        """A whole tensor of the adapter as rows of float32; small ones are kept for the next slice."""
        return self._keep(name, lambda: rows_of(self._adapter, name, 0, self._adapter.specs[name].shape[0]))

    def _rows(self, name: str, first: int, last: int) -> "Tensor":
        with self._lock:
            if name in self._kept:
                return self._kept[name][first:last]
        return rows_of(self._adapter, name, first, last)

    def _keep(self, name: str, read: Callable[[], "Tensor"]) -> "Tensor":
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
        tensor = read()
        with self._lock:
            self._num_kept += tensor.numel() if name not in self._kept else 0
            self._kept[name] = tensor
            while self._num_kept > _KEPT_ELEMENTS:
                self._num_kept -= self._kept.popitem(last=False)[1].numel()
        return tensor


def _over(magnitudes: "Tensor", lengths: "Tensor") -> "Tensor":
    """What rows are multiplied by. One of zeros has no direction: it stays, where peft's 0/0 is no number."""
    return (magnitudes / lengths).masked_fill_(lengths == 0, 0)


def rows_of(source: ModelSource, name: str, first: int, last: int) -> "Tensor":
    """Rows of a tensor, as float32: (rows, all other axes)."""
    spec = source.specs[name]
    width = spec.num_elements // spec.shape[0]
    return _elements(source, name, first * width, (last - first) * width).float().view(last - first, width)


def _elements(source: ModelSource, name: str, start: int, count: int) -> "Tensor":
    """Elements of a tensor, as stored."""
    import torch

    spec = source.specs[name]
    stored = torch.empty(count, dtype=torch_dtype(spec.dtype))
    source.read_bytes(name, start * spec.dtype.bits // 8, bytes_of(stored))
    return stored
