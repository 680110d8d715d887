"""The pass: every tensor of all models is read once in slices for sums, and weight matrices once more for spectra.

Threads take pieces in the order of the files. Sums over slices are added in that order, whoever made them, so that no
figure depends on the number of threads. Memory is that of a slice of every model and of two matrices for each thread.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from operator import add
from threading import BoundedSemaphore, Lock, local
from typing import TYPE_CHECKING

from mergetool.analysis.beside import Beside, OtherNumbers
from mergetool.arch.matrices import is_matrix
from mergetool.engine.progress import Progress
from mergetool.kernels.differences import ratio
from mergetool.kernels.sketch import Spectrum, shared, spectrum
from mergetool.kernels.spectral import Factors, Interference, concatenated, interference
from mergetool.kernels.task_vectors import SliceSums, tally
from mergetool.tensors.dtypes import torch_dtype
from mergetool.tensors.io import bytes_of
from mergetool.tensors.source import ModelSource

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SLICE = 1 << 16
"""Entries of every model that are looked at together: few enough for the processor's cache."""
_PIECE = 1 << 22
"""Entries that one thread looks at in a row."""
_ALL = 1 << 18
"""Entries up to which a tensor is looked at closely everywhere; of larger ones, a `_PART` of a slice in `_ONE_IN`."""
_ONE_IN, _PART = 2, 8
_OF_CONVOLUTION = 4
"""Axes of a convolution over images; three axes may be experts."""
DIRECTIONS = 16
"""Leading directions of each matrix."""
_LARGE_MATRIX, _TOGETHER = 1 << 23, 4
"""Of matrices with more entries, so many are held at the same time."""
_LARGEST_MATRIX = 1 << 28
"""Entries up to which a matrix is held at all."""

_MOST_ROWS = 1000
"""Rows that are looked at to tell whether a tokenizer is a model's own."""

Piece = tuple[str, int, int]
"""A tensor, its first entry, and the one behind its last."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """What is known of the task vectors of one weight matrix."""

    spectra: tuple[Spectrum, ...]
    """One for each model."""
    interference: Interference
    """Between the leading directions of all models."""
    alignment: tuple[tuple[int, int, float, float], ...]
    """Pairs of models by number, and the share of their leading directions that they have in common: output, input."""


@dataclass(frozen=True, eq=False)
class Readings:
    """All that was found, by tensor."""

    tallies: dict[str, SliceSums]
    matrices: dict[str, Matrix]
    rows: dict[str, float]
    """Of models whose tokenizers number tokens otherwise: how far those rows are from the first model's rows of the
    same numbers, relative to these."""
    skipped: tuple[str, ...]
    """Matrices that are too large to be held."""
    bytes_read: int
    workers: int


def measure(models: Beside, progress: Progress, workers: int | None = None) -> Readings:
    """Read all models. Raises SourceError for files that cannot be read."""
    count = workers or min(32, len(os.sched_getaffinity(0)))
    pass_ = _Pass(models, progress)
    chosen = [name for name in models.names if _is_weight(models, name)]
    held = [name for name in chosen if _size(models, name) <= _LARGEST_MATRIX]
    twice = held if models.reference == "mean" else []
    progress.start(sum(map(pass_.size, (*models.names, *held, *twice))), "analyzing")
    tallies: dict[str, SliceSums] = {}
    matrices: dict[str, Matrix] = {}
    with ThreadPoolExecutor(count) as pool:
        for name, found in _in_order(pool, count, pass_.jobs(frozenset(held))):
            if isinstance(found, Matrix):
                matrices[name] = found
            else:
                tallies[name] = reduce(add, [tallies[name], found] if name in tallies else [found])
    left_out = tuple(name for name in chosen if name not in held)
    return Readings(tallies, matrices, pass_.rows(), left_out, pass_.bytes_read, count)


def _looked_at(total: int, begin: int, end: int) -> int:
    """How many entries of a slice of a tensor are looked at closely."""
    if total <= _ALL:
        return end - begin
    return 0 if begin // SLICE % _ONE_IN else -(-(end - begin) // _PART)


def _is_weight(models: Beside, name: str) -> bool:
    shape = models.shape(name)
    plain = len(shape) in (2, _OF_CONVOLUTION) and is_matrix(name, shape, "llm", conv="matricize")
    return plain and name not in models.tokens and min(models.matrix(name)) > 1


def _size(models: Beside, name: str) -> int:
    return models.sources[models.leader].specs[name].num_elements


Job = tuple[str, Callable[[], SliceSums | Matrix]]


def _in_order(pool: ThreadPoolExecutor, count: int, jobs: Iterable[Job]) -> Iterator[tuple[str, SliceSums | Matrix]]:
    """Results in the order of the jobs, of which no more are begun than keep all threads busy."""
    waiting: deque[tuple[str, Future[SliceSums | Matrix]]] = deque()
    try:
        for name, job in jobs:
            waiting.append((name, pool.submit(job)))
            if len(waiting) > 2 * count:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _Pass:
    """Reads slices and whole matrices, and has them measured."""

    def __init__(self, models: Beside, progress: Progress) -> None:
        self._models, self._progress, self._lock = models, progress, Lock()
        self._large = BoundedSemaphore(_TOGETHER)
        self._rooms = local()
        self.bytes_read = 0

    def jobs(self, matrices: frozenset[str]) -> Iterator[Job]:
        """Of each tensor its pieces, then its spectra, for which it may still be in memory."""
        for name in self._models.names:
            total = _size(self._models, name)
            for start in range(0, total, _PIECE):
                yield name, _bound(self._piece, (name, start, min(start + _PIECE, total)))
            if name in matrices:
                yield name, _bound(self._matrix, name)

    def size(self, name: str) -> int:
        """Bytes of a tensor in all models."""
        return sum(source.specs[name].num_bytes for source in self._models.sources.values())

    def rows(self) -> dict[str, float]:
        """How far rows are from the first model's of the same numbers, where tokenizers say that tokens differ."""
        name = next((name for name in self._models.names if name in self._models.tokens), None)
        if name is None:
            return {}
        return {
            model: self._apart(name, each)
            for model, each in self._models.renumbered.items()
            if name in each.stored.specs and each.stored.specs[name].shape == self._models.shape(name)
        }

    def _apart(self, name: str, other: OtherNumbers) -> float:
        width = _size(self._models, name) // self._models.shape(name)[0]
        one, two = (self._room(use, width, self._dtype(name)) for use in ("below", "change"))
        apart2 = norm2 = 0.0
        for row in other.rows[:: -(-len(other.rows) // _MOST_ROWS)]:
            for source, values in ((self._models.sources[self._models.leader], one), (other.stored, two)):
                self._read(name, row * width, (row + 1) * width, source, values)
            apart2 += float((two - one).square().sum())
            norm2 += float(one.square().sum())
        return ratio(apart2, norm2)

    def _piece(self, piece: Piece) -> SliceSums:
        name, start, stop = piece
        total = _size(self._models, name)
        every = ((begin, min(begin + SLICE, stop)) for begin in range(start, stop, SLICE))
        return reduce(add, (tally(self._slice(name, *each), _looked_at(total, *each)) for each in every))

    def _slice(self, name: str, begin: int, end: int) -> "Tensor":
        """(n + 1, L): what changes are measured from, and the changes."""
        import torch

        count = len(self._models.models) + 1
        x = self._room("slice", count * (end - begin), self._dtype(name)).view(count, -1)
        rows = x[1:] if self._models.reference == "mean" else x
        for row, source in zip(rows, self._models.sources.values(), strict=True):
            self._read(name, begin, end, source, row)
        if self._models.reference == "mean":
            torch.mean(rows, 0, out=x[0])
        if self._models.reference != "zero":
            _subtract(x)
        kept = self._kept(name, begin, end)
        return x if kept is None else x[:, kept]

    def _read(self, name: str, begin: int, end: int, source: ModelSource, into: "Tensor") -> None:
        dtype = source.specs[name].dtype
        stored = self._room("stored", end - begin, torch_dtype(dtype))
        source.read_bytes(name, begin * dtype.bits // 8, bytes_of(stored))
        into.copy_(stored)
        with self._lock:
            self.bytes_read += stored.nbytes
            self._progress.advance(stored.nbytes)

    def _room(self, use: str, length: int, dtype: "torch.dtype") -> "Tensor":
        """Memory of this thread's own, kept from call to call; what is large is made anew and freed."""
        import torch

        if length > _LARGE_MATRIX:
            return torch.empty(length, dtype=dtype)
        kept = self._rooms.__dict__
        if len(kept.get(f"{use} {dtype}", ())) < length:
            kept[f"{use} {dtype}"] = torch.empty(length, dtype=dtype)
        room: Tensor = kept[f"{use} {dtype}"][:length]
        return room

    def _dtype(self, name: str) -> "torch.dtype":
        import torch

        wide = any(source.specs[name].dtype.name == "F64" for source in self._models.sources.values())
        return torch.float64 if wide else torch.float32

    def _kept(self, name: str, begin: int, end: int) -> "Tensor | None":
        """Which entries are in rows that all models have."""
        import numpy as np
        import torch

        rows = self._models.skipped.get(name)
        if rows is None:
            return None
        width = max(1, _size(self._models, name) // max(1, len(rows)))
        return torch.from_numpy(~rows[np.arange(begin, end) // width])

    def _matrix(self, name: str) -> Matrix:
        """Leading directions of every model's change, one change after the other."""
        with self._large if _size(self._models, name) > _LARGE_MATRIX else nullcontext():
            below = self._below(name)
            sources = (self._models.sources[model] for model in self._models.models)
            found = [spectrum(self._change(name, source, below), DIRECTIONS) for source in sources]
        leading = [directions for directions, _ in found]
        return Matrix(tuple(each for _, each in found), _interference(leading), tuple(_alignment(leading)))

    def _below(self, name: str) -> "Tensor | None":
        """What changes are measured from, as a whole."""
        if self._models.reference == "zero":
            return None
        sources = [*self._models.sources.values()]
        used = sources if self._models.reference == "mean" else sources[:1]
        below = self._whole(name, used[0], "below")
        for source in used[1:]:
            below += self._whole(name, source, "change")
        return below.div_(len(used))

    def _change(self, name: str, source: ModelSource, below: "Tensor | None") -> "Tensor":
        """What one model changes of a whole tensor; zeros where anything is not finite."""
        change = self._whole(name, source, "change")
        if below is not None:
            change -= below
        if not math.isfinite(float(change.sum())):
            change.nan_to_num_(0.0, 0.0, 0.0)
        return change.view(self._models.matrix(name))

    def _whole(self, name: str, source: ModelSource, use: str) -> "Tensor":
        import torch

        whole = self._room(use, _size(self._models, name), torch.float32)
        for begin in range(0, len(whole), SLICE):
            end = min(begin + SLICE, len(whole))
            self._read(name, begin, end, source, whole[begin:end])
        return whole


def _subtract(x: "Tensor") -> None:
    """The first vector from all others. Where it is not finite, only those that are not either stay so."""
    sound = x[0].isfinite()
    if sound.all():
        x[1:] -= x[0]
    else:
        own = x[1:].isfinite()
        x[1:] = (x[1:] - x[0]).masked_fill_(own & ~sound, 0.0)


def _bound(call: Callable[..., SliceSums | Matrix], argument: Piece | str) -> Callable[[], SliceSums | Matrix]:
    return lambda: call(argument)


def interference_by_chance(shape: tuple[int, ...], models: int) -> float:
    """What directions that have nothing to do with each other come to, if all are of one size.

    An entry of U^T U - I or V^T V - I between two models is then about normal, with variance 1/m or 1/n; those of one
    model are 0.
    """
    kept = kept_directions(shape, models)
    every = kept * models
    within, across = math.sqrt(every - kept), math.sqrt(max(0, every - 2 * kept))
    mean = within / models + across * (1 - 1 / models)
    return math.sqrt(2 / math.pi) * every * mean / math.sqrt(shape[0] * shape[1])


def kept_directions(shape: tuple[int, ...], models: int) -> int:
    """Leading directions of each model that are held against each other's: as many as fit side by side."""
    return max(1, min(DIRECTIONS, min(shape) // models))


def _interference(leading: Sequence[Factors]) -> Interference:
    kept = kept_directions((leading[0].u.shape[0], leading[0].v.shape[0]), len(leading))
    return interference(concatenated([each.leading(kept) for each in leading]))


def _alignment(leading: Sequence[Factors]) -> Iterator[tuple[int, int, float, float]]:
    kept = kept_directions((leading[0].u.shape[0], leading[0].v.shape[0]), len(leading))
    cut = [each.leading(kept) for each in leading]
    for (i, one), (j, other) in combinations(enumerate(cut), 2):
        yield i, j, shared(one.u, other.u), shared(one.v, other.v)
