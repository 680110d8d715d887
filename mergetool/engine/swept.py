"""What a worker does of a sweep: it makes a slice for every result, sharing what they have in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mergetool.errors import MergeError, at
from mergetool.methods.base import Stats, TensorGroup
from mergetool.methods.group import Note
from mergetool.planning.graph import Step
from mergetool.planning.operations import Merge
from mergetool.planning.sweep import Sweep


class Sweeping(ABC):
    """A worker, as far as sweeps need one."""

    @abstractmethod
    def merge(self, step: Step, start: int, stop: int, notes: list[Note], operation: Merge, stats: Stats) -> None: ...
    @abstractmethod
    def _group(self, step: Step, start: int, stop: int, owner: str = "") -> TensorGroup: ...
    @abstractmethod
    def _finish(self, step: Step, start: int, merged: Tensor, notes: list[Note]) -> None: ...

    def sweep(self, step: Step, start: int, stop: int, notes: list[Note], operation: Sweep, stats: Stats) -> None:
        """Have a slice merged for all results."""
        for places in operation.alike:
            told = operation.stats_of(places[0], stats)
            if all(operation.points[place] == operation.points[places[0]] for place in places):
                self._once(step, start, stop, notes, operation, places, told)
            else:
                self._scaled(step, start, stop, notes, operation, places, told)

    def _once(
        self,
        step: Step,
        start: int,
        stop: int,
        notes: list[Note],
        operation: Sweep,
        places: Sequence[int],
        stats: Stats,
    ) -> None:
        """The same for all these results."""
        own: list[Note] = []
        point = operation.points[places[0]]
        with at(operation.results[places[0]]):
            self.merge(operation.step_of(step, places), start, stop, own, point, stats)
        notes += [note for place in places for note in operation.noted(place, own)]

    def _scaled(
        self,
        step: Step,
        start: int,
        stop: int,
        notes: list[Note],
        operation: Sweep,
        places: Sequence[int],
        stats: Stats,
    ) -> None:
        """What is added to the base is made once, and added with the factor of each result."""
        point, group = operation.points[places[0]], self._group(step, start, stop)
        with at(f"{point.name}: {step.name}"), told_of_overflow():
            found = point.method.change(group, point.params, stats)
        if found is None:
            for place in places:
                self._once(step, start, stop, notes, operation, [place], stats)
            return
        assert group.base is not None
        change, divisor = found
        room = group.scratch("swept")
        for place in places:
            own = list(group.notes)
            with at(f"{operation.results[place]}: {point.name}: {step.name}"), told_of_overflow():
                factor = operation.points[place].params.scale / divisor
                torch.add(group.base, change, alpha=factor, out=room)
            with at(operation.results[place]):
                self._finish(operation.step_of(step, [place]), start, room, own)
            notes += operation.noted(place, own)


@contextmanager
def told_of_overflow() -> Iterator[None]:
    """torch's answer to a factor such as 1e300 in float32, as ours."""
    try:
        yield
    except RuntimeError as error:
        if "without overflow" not in str(error):
            raise
        raise MergeError(f"{error}", "", "use smaller numbers, or set compute.dtype: float64") from None
