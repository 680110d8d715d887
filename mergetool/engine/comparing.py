"""A sink that writes nothing: every slice is held against the tensors of a checkpoint that is there already."""

import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergetool.errors import SourceError
from mergetool.kernels.last_place import Distance, distance
from mergetool.planning import Plan, Step
from mergetool.planning.graph import SLICE_ELEMENTS
from mergetool.tensors.dtypes import DType, torch_dtype
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.io import bytes_of
from mergetool.tensors.source import ModelSource

NOISE = 2.0**-20
"""What another order of additions changes in float32, relative to a tensor's numbers."""
NOISE_OF_MATRICES = 2.0**-14
"""The same for methods that take whole matrices apart."""
_NEARER = 0.25
"""A tensor is nearer to a result than to any input if it is off by at most this share of the way."""
_MOST = 0.9
"""Of all entries of tensors that are in question."""


@dataclass(frozen=True)
class Opposite:
    """The tensor of a checkpoint that an output tensor is to be."""

    name: str
    skipped: np.ndarray[Any, np.dtype[np.bool_]] | None = None
    """Rows that the checkpoint has not."""


@dataclass
class Compared:
    """What was found about one tensor of the checkpoint."""

    name: str
    entries: int
    other: int = 0
    beyond: int = 0
    far: int = 0
    worst: float = 0.0
    units: float = 0.0
    place: int = 0
    expected: float = 0.0
    found: float = 0.0
    off: float = 0.0
    """How far it is off, where one rounding does not explain it: squares, added up."""
    moved: list[float] = field(default_factory=list)
    """How far the result is from every input there."""
    near: bool = False
    """Whether it may have been rounded on the way, as `settle` decides."""

    @property
    def verdict(self) -> str:
        """In a word: same, rounded, near, different."""
        if self.beyond == 0:
            return "rounded" if self.other else "same"
        return "near" if self.near else "different"

    @property
    def nearer(self) -> bool:
        """Whether it is nearer to the result than to any input."""
        return bool(self.moved) and self.off <= _NEARER**2 * min(self.moved)

    def add(self, apart: Distance, start: int, expected: Tensor, values: Tensor, moved: Sequence[float]) -> None:
        """One more slice, which begins at this element."""
        self.other += apart.other
        self.beyond += apart.beyond
        self.far += apart.far
        if apart.beyond and (apart.worst > self.worst or not self.worst):
            self.worst, self.units, self.place = apart.worst, apart.units, start + apart.place
            self.expected, self.found = float(expected[apart.place]), float(values[apart.place])
        if moved:
            self.off += _squares(values, expected)
            self.moved = [sum(pair) for pair in zip(self.moved or [0.0] * len(moved), moved, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """For people and programs."""
        return {
            "tensor": self.name,
            "verdict": self.verdict,
            "entries": self.entries,
            "differing": self.beyond,
            "max_difference": _number(self.worst),
            "units_in_last_place": _number(self.units),
            "index": self.place,
            "expected": _number(self.expected),
            "found": _number(self.found),
        }


def settle(compared: Iterable[Compared]) -> None:
    """Decide which tensors may have been rounded on the way to their dtype: those that are off by a few units at most.

    A little training looks like that, too. So the tensors together must be much nearer to the result than to any
    input; those whose changes are less than a unit (norms, mostly) cannot say so by themselves.
    """
    few = [each for each in compared if each.beyond and not each.far and each.moved]
    clear = sum(each.entries for each in few if each.nearer)
    for each in few:
        each.near = clear >= _MOST * sum(each.entries for each in few)


class ComparingSink:
    """Holds slices against a checkpoint."""

    folder: Path | None = None

    def __init__(
        self,
        plan: Plan,
        wanted: Mapping[str, TensorSpec],
        found: ModelSource,
        places: Mapping[str, Sequence[Opposite]],
    ) -> None:
        """`plan` rounds nothing; `wanted` is what each of its tensors would be stored as, and `places` where it is."""
        self._plan, self._wanted, self._found, self._places = plan, wanted, found, places
        self._made = plan.specs
        self._steps = {slot.spec.name: step for step in plan.steps for slot in step.slots}
        self._lock = threading.Lock()
        names = [each.name for opposites in places.values() for each in opposites]
        self.compared = {name: Compared(name, found.specs[name].num_elements) for name in names}
        self.broken: list[SourceError] = []
        """What is wrong with the checkpoint, if it cannot be read: what each worker met."""

    def write(self, shard: int, name: str, begin: int, data: memoryview) -> None:
        dtype = self._made[name].dtype
        for place in self._places.get(name, ()) if len(data) else ():
            if dtype.is_float:
                self._compare(name, place, begin * 8 // dtype.bits, torch.frombuffer(data, dtype=torch_dtype(dtype)))
            else:
                self._compare_bytes(place.name, dtype, begin, data)

    def sync(self) -> None:
        pass

    def source(self) -> ModelSource:
        raise AssertionError("nothing was written")

    def _compare(self, name: str, place: Opposite, start: int, made: Tensor) -> None:
        """Numbers, some at a time."""
        step, wanted = self._steps[name], torch_dtype(self._wanted[name].dtype)
        noise = NOISE_OF_MATRICES if step.granularity == "tensor" else NOISE
        for begin in range(0, len(made), SLICE_ELEMENTS):
            first, expected = start + begin, made[begin : begin + SLICE_ELEMENTS]
            values = self._values(place.name, first, len(expected))
            if place.skipped is not None:
                expected = _only_known(expected, values, first, self._made[name], place.skipped)
            apart = distance(expected, values, wanted, noise)
            if apart.other:
                moved = self._moved(step, name, first, expected) if apart.beyond and not apart.far else ()
                with self._lock:
                    self.compared[place.name].add(apart, first, expected, values, moved)

    def _moved(self, step: Step, name: str, start: int, expected: Tensor) -> Sequence[float]:
        """How far a slice of the result is from every input; nothing where they cannot be laid on each other."""
        shapes = {self._plan.spec(operand).shape for operand in step.operands}
        if not step.operation.arithmetic or shapes != {self._made[name].shape}:
            return ()
        sources = self._plan.sources
        inputs = (_read(sources[each.source], each.tensor, start, len(expected)) for each in step.operands)
        return [_squares(values, expected) for values in inputs]

    def _compare_bytes(self, name: str, dtype: DType, begin: int, data: memoryview) -> None:
        """Whole numbers and codes, which nothing rounds."""
        stored = bytearray(len(data))
        with self._watched():
            self._found.read_bytes(name, begin, memoryview(stored))
        if stored == data:
            return
        whole = dtype.name[0] in "IU"
        kind = torch_dtype(dtype) if whole else torch.uint8
        expected, values = (torch.frombuffer(each, dtype=kind) for each in (data, stored))
        differs = expected != values
        count, place = int(differs.sum()), int(differs.to(torch.uint8).argmax())
        apart = abs(float(values[place]) - float(expected[place]))
        start = begin * 8 // (dtype.bits if whole else 8)
        with self._lock:
            difference = Distance(count, count, count, apart, 0.0, place)
            self.compared[name].add(difference, start, expected, values, ())

    def _values(self, name: str, start: int, count: int) -> Tensor:
        with self._watched():
            return _read(self._found, name, start, count)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Remember that it is the checkpoint itself that cannot be read."""
        try:
            yield
        except SourceError as error:
            self.broken.append(error)
            raise


def _only_known(
    expected: Tensor, values: Tensor, start: int, spec: TensorSpec, skipped: np.ndarray[Any, np.dtype[np.bool_]]
) -> Tensor:
    """What is expected, but in rows that are skipped what is there."""
    width = max(1, spec.num_elements // max(1, len(skipped)))
    rows = (start + np.arange(len(expected))) // width
    return torch.where(torch.from_numpy(skipped[rows]), values.to(expected.dtype), expected)


def _read(source: ModelSource, name: str, start: int, count: int) -> Tensor:
    """Elements of a tensor, as they are stored."""
    dtype = source.specs[name].dtype
    stored = torch.empty(count, dtype=torch_dtype(dtype))
    source.read_bytes(name, start * dtype.bits // 8, bytes_of(stored))
    return stored


def _squares(values: Tensor, expected: Tensor) -> float:
    return float((values.double() - expected).square().sum())


def _number(value: float) -> float | str:
    """A number as JSON knows it; what is not finite in words."""
    return value if math.isfinite(value) else str(value)
