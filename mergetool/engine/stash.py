"""What a worker reads, as it is stored. Where a tensor is read again and again, much of it stays here in between.

Reading from the system's cache costs more than a copy: pages are looked for and locked one by one.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from mergetool.planning.graph import KEPT_BYTES, SLICE_ELEMENTS, Operand
from mergetool.tensors.dtypes import torch_dtype
from mergetool.tensors.io import bytes_of
from mergetool.tensors.source import ModelSource

_BYTES_PER_ELEMENT = 8
_ALIGNED = 64


class Stash:
    """Room for what is read. Used by one thread."""

    def __init__(self, sources: Mapping[str, ModelSource]) -> None:
        self._sources = sources
        self._room = torch.empty(SLICE_ELEMENTS * _BYTES_PER_ELEMENT, dtype=torch.uint8)
        self.room = bytes_of(self._room)
        """For whoever reads bytes by himself."""
        self._views: dict[tuple[torch.dtype, int], Tensor] = {}
        self._heap: Tensor | None = None
        self._kept: dict[tuple[str, str, int, int], Tensor] | None = None
        self._used = 0

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """While inside, what is read a second time is not read from its file again, as far as there is room."""
        self._kept, self._used = {}, 0
        try:
            yield
        finally:
            self._kept = None

    def read(self, operand: Operand, start: int, count: int, *, keep: bool = True) -> Tensor:
        """So many elements of an operand, at most those of a slice. They are there until the next call."""
        key = (operand.source, operand.tensor, start, count)
        if self._kept is not None and key in self._kept:
            return self._kept[key]
        source = self._sources[operand.source]
        dtype = torch_dtype(source.specs[operand.tensor].dtype)
        values = self._place(key, dtype, count, keep=keep)
        source.read_bytes(operand.tensor, start * dtype.itemsize, bytes_of(values))
        return values

    def keep(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Room for elements that stay as long as what is kept, if there is any."""
        size = math.prod(shape) * dtype.itemsize
        if self._kept is None or self._used + size > KEPT_BYTES:
            return None
        if self._heap is None:
            self._heap = torch.empty(KEPT_BYTES, dtype=torch.uint8)
        values = self._heap[self._used : self._used + size].view(dtype).view(shape)
        self._used += -(-size // _ALIGNED) * _ALIGNED
        return values

    def _place(self, key: tuple[str, str, int, int], dtype: torch.dtype, count: int, *, keep: bool) -> Tensor:
        """Where to read to: the stash, where something may be kept and there is room, else what all share."""
        values = self.keep((count,), dtype) if keep else None
        if values is not None and self._kept is not None:
            self._kept[key] = values
            return values
        if (dtype, count) not in self._views:
            self._views[dtype, count] = self._room[: count * dtype.itemsize].view(dtype)
        return self._views[dtype, count]
