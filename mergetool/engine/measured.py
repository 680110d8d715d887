"""What was measured on the models of a step, as its method sees it."""

from collections.abc import Callable

from torch import Tensor

from mergetool.planning.graph import Operand, Plan, Step
from mergetool.planning.measures import StatisticSource

Read = Callable[[Operand, int, tuple[int, ...], object], Tensor]
"""(operand, first element, shape, whose buffer) -> values in compute dtype."""


class Measured:
    """The statistics of one slice of a step. Each is read when it is asked for, into one and the same buffer."""

    def __init__(self, plan: Plan, step: Step, start: int, shape: tuple[int, ...], read: Read) -> None:
        self._plan, self._step, self._start, self._shape, self._read = plan, step, start, shape, read

    @property
    def turned(self) -> bool:
        operand = self._step.statistics[0]
        return operand.tensor in self._source(0).form.turned

    def of(self, place: int) -> Tensor:
        operand = self._step.statistics[place]
        spec = self._source(place).specs[operand.tensor]
        if spec.shape == self._step.spec.shape:
            return self._read(operand, self._start, self._shape, "statistic")
        return self._read(operand, 0, spec.shape, "statistic")

    def of_base(self) -> Tensor | None:
        operand = self._step.statistic_of_base
        if operand is None:
            return None
        return self._read(operand, 0, self._plan.spec(operand).shape, "statistic of the base")

    def size(self, place: int) -> float:
        return self._source(place).size

    def _source(self, place: int) -> StatisticSource:
        source = self._plan.sources[self._step.statistics[place].source]
        assert isinstance(source, StatisticSource)
        return source
