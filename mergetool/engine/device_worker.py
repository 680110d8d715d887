"""A worker whose arithmetic is done on a device: in few large slices, which travel as they are stored.

A call of an operation costs a device as much as some million elements, so slices are as long as its memory allows.
What is not worth the way (small tensors, plain copies), and what does not fit, is done on the CPU.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import TypeVar

import torch
from torch import Tensor

from mergetool.bundle.store import FactorStore
from mergetool.engine import devices
from mergetool.engine.devices import free_device, free_memory, load_linear_algebra, own_stream
from mergetool.engine.sinks import Sink
from mergetool.engine.transfers import Transfers
from mergetool.engine.worker import Worker, runs_of, sliced
from mergetool.methods.base import Params, StatisticsPass, Stats
from mergetool.methods.group import Note
from mergetool.planning import Plan, Step
from mergetool.planning.cost import bytes_per_element
from mergetool.planning.graph import SLICE_ELEMENTS, Operand
from mergetool.tensors.dtypes import torch_dtype
from mergetool.tensors.source import ModelSource

_LONGEST = 1 << 24
"""Elements of a slice beyond which there is nothing to gain."""
_SLICES, _WHOLE = 0.3, 0.5
"""Of a device's free memory for slices, and for tensors that are held whole; libraries want some, too."""
_T = TypeVar("_T")


def slice_elements(plan: Plan, device: torch.device, workers: int) -> int:
    """Elements of each model that a worker takes to a device at once, where several share what memory it has left."""
    free = free_memory(device)
    if free is None:
        return SLICE_ELEMENTS
    share = _SLICES if any(step.granularity == "tensor" for step in plan.steps) else _SLICES + _WHOLE
    most = int(share * free / max(1, workers) / bytes_per_element(plan, on_device=True))
    return max(devices.LEAST_SLICE, min(_LONGEST, 1 << max(0, most.bit_length() - 1)))


def memory_for_whole(device: torch.device) -> int | None:
    """Bytes that whole tensors may take there together, as far as is known."""
    free = free_memory(device)
    return None if free is None else int(_WHOLE * free)


class DeviceWorker(Worker):
    """See `Worker`. Made and used by one thread."""

    def __init__(
        self, plan: Plan, sink: Sink, device: torch.device, store: FactorStore | None = None, length: int | None = None
    ) -> None:
        super().__init__(plan, sink, store)
        self._device = device
        self._length = length or slice_elements(plan, device, 1)
        self._here: Worker | None = None
        self._full = False
        self._sample: Sequence[tuple[int, int]] | None = None
        with own_stream(device):
            self._transfers = Transfers(device)
        if any(step.operation.granularity(step.spec) == "tensor" for step in plan.steps):
            load_linear_algebra(device)

    def count(self, step: Step, start: int, stop: int, counts: StatisticsPass) -> Tensor:
        counted, _ = self._tried(step, lambda worker: worker._count(step, start, stop, counts))
        return counted

    def visit(self, step: Step, counts: StatisticsPass) -> tuple[Stats, list[Note], list[int]]:
        return super().visit(step, counts) if self._is_worth(step) else self._cpu.visit(step, counts)

    def perform(self, step: Step, start: int, stop: int, stats: Stats) -> list[Note]:
        made, notes = self._tried(step, lambda worker: worker._perform(step, start, stop, stats))
        return [*notes, *made]

    def _tried(self, step: Step, do: Callable[[Worker], _T]) -> tuple[_T, list[Note]]:
        """Have something done, and what is to be noted about where.

        A device that has no memory left gets smaller slices; what cannot be sliced further is made on the CPU.
        """
        notes: list[Note] = []
        while self._is_worth(step):
            try:
                with own_stream(self._device):
                    return do(self), notes
            except torch.cuda.OutOfMemoryError:
                self._make_room()
            if step.row <= self._length // 2 and self._length > devices.LEAST_SLICE:
                self._length //= 2
                notes.append(f"the device has too little memory: slices of {self._length} elements")
                continue
            self._full = True
            notes.append("the device has too little memory: merged on the CPU")
            break
        return do(self._cpu), notes

    def _is_worth(self, step: Step) -> bool:
        """Whether a step is better done on the device."""
        if not step.operation.arithmetic or (self._full and step.row > self._length):
            return False
        return step.granularity == "tensor" or step.spec.num_elements >= devices.LEAST_SLICE

    @property
    def _cpu(self) -> Worker:
        """Who does the rest."""
        if self._here is None:
            self._here = Worker(self._plan, self._sink, self._store)
            self._here.shelves = self.shelves
        return self._here

    def _make_room(self) -> None:
        self._views.clear()
        self._buffers.clear()
        free_device(self._device)

    def _count(self, step: Step, start: int, stop: int, counts: StatisticsPass) -> Tensor:
        """A sample comes to the device in one piece."""
        if counts.one_in == 1:
            return super()._count(step, start, stop, counts)
        step = sliced(step)
        self._sample = runs_of(step, start, stop, counts.one_in)
        try:
            group = self._group(step, 0, sum(end - begin for begin, end in self._sample))
        finally:
            self._sample = None
        return counts.observe(iter([group]), Params(**step.operation.numbers))

    _one_by_one = False  # copies to a device overlap with what is done there

    def _scratch(self, shape: tuple[int, ...]) -> Callable[[str, torch.dtype], Tensor]:
        """What is larger than a buffer is kept as long as the slice is worked on."""
        return cache(super()._scratch(shape))

    def _read(
        self, operand: Operand, start: int, shape: tuple[int, ...], place: object, *, keep: bool = True
    ) -> Tensor:
        values = self._buffer(place, shape, self._compute)
        source = self._plan.sources[operand.source]
        dtype = torch_dtype(source.specs[operand.tensor].dtype)
        runs = self._sample or [(start, start + values.numel())]
        self._transfers.up(values, dtype, partial(_fill, source, operand.tensor, dtype.itemsize, runs))
        return values

    def _store_at(self, step: Step, begin: int, stored: Tensor) -> None:
        if stored.device.type == "cpu":
            super()._store_at(step, begin, stored)
        else:
            self._transfers.down(stored, lambda at, data: self._write(step, begin + at, data))


def _fill(
    source: ModelSource, name: str, itemsize: int, runs: Sequence[tuple[int, int]], begin: int, room: memoryview
) -> None:
    """Read elements of runs, from the given one of all of them on."""
    for start, stop in _between(runs, begin, begin + len(room) // itemsize):
        size = (stop - start) * itemsize
        source.read_bytes(name, start * itemsize, room[:size])
        room = room[size:]


def _between(runs: Sequence[tuple[int, int]], begin: int, end: int) -> Iterator[tuple[int, int]]:
    """What of runs lies between two places, were they one behind the other."""
    for start, stop in runs:
        length = stop - start
        if begin < length and end > 0:
            yield start + max(0, begin), start + min(length, end)
        begin, end = begin - length, end - length
