"""Compare two checkpoints tensor by tensor, in slices, by several threads; with a base, their task vectors, too."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Protocol

from mergetool.bundle import is_bundle
from mergetool.checkpoints.family import assemble
from mergetool.checkpoints.other_rows import OtherRows, Rows
from mergetool.errors import SourceError
from mergetool.kernels.differences import Sums, sums
from mergetool.outputs.difference import Comparison, TensorDifference, added, most_changed_first
from mergetool.outputs.differing_bundles import difference_of_bundles
from mergetool.outputs.settings_beside import difference_of_locks, is_lock, settings_beside
from mergetool.planning.sources import Lookup
from mergetool.tensors.dtypes import DType, torch_dtype
from mergetool.tensors.folder import is_adapter
from mergetool.tensors.io import bytes_of
from mergetool.tensors.source import ModelSource

if TYPE_CHECKING:
    from torch import Tensor

_SLICE = 1 << 16
"""Elements of a slice: few enough to stay in the processor's cache."""
_PIECE = 1 << 22
"""Elements that one thread compares in a row."""
_A, _B, _BASE = "A", "B", "base"
Piece = tuple[str, int, int]
"""A tensor, its first element, and the one behind its last."""


class Listener(Protocol):
    """Hears how far it is."""

    def start(self, total: int, label: str) -> None: ...
    def advance(self, count: int) -> None: ...
    def say(self, text: str) -> None: ...


def difference(
    a: str,
    b: str,
    base: str | None = None,
    *,
    workers: int | None = None,
    listener: Listener | None = None,
) -> Comparison:
    """Compare two models, two adapters, two bundles or two locks. Raises SourceError or HubError."""
    if is_lock(a) or is_lock(b):
        return difference_of_locks(a, b)
    if base is None and is_bundle(Path(a)) and is_bundle(Path(b)):
        return difference_of_bundles(a, b, workers)
    with ExitStack() as opened:
        sources, warnings = _opened(a, b, base, listener)
        for source in sources.values():
            opened.enter_context(closing(source))
        pair = _Pair(sources, listener)
        with ThreadPoolExecutor(workers or min(32, len(os.sched_getaffinity(0)))) as pool:
            parts = list(pool.map(pair.compare, pair.pieces()))
        found = pair.found(a, b, base, parts)
        return replace(found, remarks=(*warnings, *found.remarks))


def _opened(
    a: str, b: str, base: str | None, listener: Listener | None
) -> tuple[dict[str, ModelSource], Sequence[str]]:
    """All that is compared, with its weights here, and what people should know of it."""
    given = {_A: a, _B: b, **({_BASE: base} if base is not None else {})}
    _check_kinds(given)
    lookup = Lookup(Path.cwd())
    opened = _look_up(lookup, given)
    if lookup.missing:
        lookup.fetch(listener.say if listener is not None else lambda _: None)
        lookup.warnings.clear()
        opened = _look_up(lookup, given)
    return opened, lookup.warnings


def _look_up(lookup: Lookup, given: Mapping[str, str]) -> dict[str, ModelSource]:
    return {
        name: lookup.open_adapter(name, text) if is_adapter(Path(text)) else lookup.open(name, text)
        for name, text in given.items()
    }


def _check_kinds(given: Mapping[str, str]) -> None:
    """Raise SourceError for what cannot be laid beside each other."""
    for text in given.values():
        if is_bundle(Path(text)):
            fix = f"compare two bundles, without --base, or one expert: mergetool inspect {text}"
            raise SourceError("is a bundle of experts, not a model", text, fix)
    adapters = [text for text in given.values() if is_adapter(Path(text))]
    if adapters and len(adapters) < len(given):
        fix = "compare two adapters, or ask whether a checkpoint has it in it: mergetool verify PATH --against RECIPE"
        raise SourceError("is an adapter, and what it is compared with is a model", adapters[0], fix)


@dataclass(frozen=True)
class _Part:
    """What was found in a piece of a tensor."""

    sums: Sums
    rounded: bool


class _Pair:
    """Two models under the names and in the vocabulary of the first, and the base, if there is one."""

    def __init__(self, sources: Mapping[str, ModelSource], listener: Listener | None) -> None:
        self._listener, self._lock = listener, Lock()
        family = assemble(sources, _A)
        seen = family.sources
        self.rows = OtherRows(seen[_A], seen[_B])
        self.sources = {**seen, _B: self.rows.shown}
        self._skipped: list[Mapping[str, Rows]] = [self.rows.skipped]
        if _BASE in seen:
            before = OtherRows(seen[_A], seen[_BASE])
            self.sources[_BASE] = before.shown
            self._skipped.append(before.skipped)
        self._stored = dict(sources)
        self.remarks = [*family.remarks, *self._words_about_sizes()]
        specs = [source.specs for source in self.sources.values()]
        self.only_a = tuple(name for name in specs[0] if name not in specs[1])
        self.only_b = tuple(name for name in specs[1] if name not in specs[0])
        both = [name for name in specs[0] if name in specs[1]]
        self.reshaped = tuple(
            (name, specs[0][name].shape, specs[1][name].shape)
            for name in both
            if specs[0][name].shape != specs[1][name].shape
        )
        alike = {name for name in both if specs[0][name].shape == specs[1][name].shape}
        self.names = sorted(alike, key=seen[_A].position)
        self._based = {
            name
            for name in self.names
            if len(specs) > 2 and name in specs[2] and specs[2][name].shape == specs[0][name].shape
        }
        if listener is not None:
            listener.start(
                sum(each[name].num_bytes for each in specs for name in self.names if name in each), "comparing"
            )

    def _words_about_sizes(self) -> Iterator[str]:
        for name, (one, two) in self.rows.sizes.items():
            yield f"{name} has {one} rows in the first and {two} in the second: rows of tokens are compared"

    def pieces(self) -> Iterator[Piece]:
        """All pieces, in the order of the first model's files."""
        for name in self.names:
            total = self.sources[_A].specs[name].num_elements
            yield from ((name, start, min(start + _PIECE, total)) for start in range(0, max(1, total), _PIECE))

    def compare(self, piece: Piece) -> _Part:
        """One piece of one tensor."""
        name, start, stop = piece
        total, rounded = Sums(), True
        for begin in range(start, stop, _SLICE):
            end = min(begin + _SLICE, stop)
            values = [_values(source, name, begin, end) for source in self._holders(name)]
            self._advance(sum(each.nbytes for each in values))
            if (kept := self._kept(name, begin, end)) is not None:
                values = [each[kept] for each in values]
            total += _sums(*values)
            rounded = rounded and _is_rounding(*values[:2])
        return _Part(total, rounded)

    def _advance(self, count: int) -> None:
        if self._listener is not None:
            with self._lock:
                self._listener.advance(count)

    def _holders(self, name: str) -> list[ModelSource]:
        models = [self.sources[_A], self.sources[_B]]
        return [*models, self.sources[_BASE]] if name in self._based else models

    def _kept(self, name: str, begin: int, end: int) -> "Tensor | None":
        """Which of these elements are in rows that all of them have; None: all."""
        import numpy as np
        import torch

        rows = [each[name] for each in self._skipped if name in each]
        if not rows:
            return None
        width = max(1, self.sources[_A].specs[name].num_elements // max(1, len(rows[0])))
        skipped = np.any(rows, axis=0)[np.arange(begin, end) // width]
        return torch.from_numpy(~skipped)

    def found(self, a: str, b: str, base: str | None, parts: list[_Part]) -> Comparison:
        """All parts put together."""
        by_name: dict[str, list[_Part]] = {name: [] for name in self.names}
        for (name, _, _), part in zip(self.pieces(), parts, strict=True):
            by_name[name].append(part)
        tensors = most_changed_first(self._tensor(name, own) for name, own in by_name.items())
        files = settings_beside(self._stored[_A], self._stored[_B], self.rows)
        only = self.only_a, self.only_b
        total, remarks = added(tensors), tuple(self.remarks)
        return Comparison(a, b, base, tensors, *only, self.reshaped, tuple(files), remarks, total)

    def _tensor(self, name: str, parts: list[_Part]) -> TensorDifference:
        dtypes = tuple(source.specs[name].dtype.name for source in self._holders(name))
        shape = self.sources[_A].specs[name].shape
        rounded = all(each.rounded for each in parts)
        return TensorDifference(name, shape, dtypes, sum((each.sums for each in parts), Sums()), rounded)


def _values(source: ModelSource, name: str, begin: int, end: int) -> "Tensor":
    """Elements of a tensor as they are stored; of codes and complex numbers, their bytes."""
    import torch

    dtype = source.specs[name].dtype
    if _is_number(dtype):
        stored = torch.empty(end - begin, dtype=torch_dtype(dtype))
        source.read_bytes(name, begin * dtype.bits // 8, bytes_of(stored))
        return stored
    first, last = begin * dtype.bits // 8, dtype.num_bytes(end)
    stored = torch.empty(last - first, dtype=torch.uint8)
    source.read_bytes(name, first, bytes_of(stored))
    return stored


def _is_number(dtype: DType) -> bool:
    return bool(dtype.torch_name) and dtype.name not in ("C64", "F8_E8M0")


def _sums(a: "Tensor", b: "Tensor", base: "Tensor | None" = None) -> Sums:
    """Of slices as they are stored."""
    import torch

    whole = a.dtype == b.dtype and not a.is_floating_point()
    first = a.double()
    second = first if a.dtype == b.dtype and torch.equal(a, b) else b.double()
    summed = sums(first, second, None if base is None else base.double())
    return replace(summed, changed=int((a != b).sum())) if whole else summed  # float64 cannot tell large ones apart


def _is_rounding(a: "Tensor", b: "Tensor") -> bool:
    """Whether the wider of two tensors, stored as the narrower one is, is that one."""
    import torch

    if a.dtype == b.dtype or not (a.is_floating_point() and b.is_floating_point()):
        return False
    wide, narrow = (a, b) if torch.finfo(a.dtype).eps < torch.finfo(b.dtype).eps else (b, a)
    return bool((wide.to(narrow.dtype) == narrow).all())
