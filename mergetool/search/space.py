"""What is searched: a box of genes, seen by optimisers as the unit cube.

A gene is a number between two bounds, on a grid if it has a step, or one of several choices. Optimisers move in
[0, 1]^d; `values` turns a point into what the genes stand for, and points that mean the same are one candidate.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Value = float | int | str | bool
Point = tuple[float, ...]
"""A place in the unit cube, one coordinate per gene."""


@dataclass(frozen=True)
class Gene:
    """One number (or choice) to be found."""

    name: str
    low: float = 0.0
    high: float = 1.0
    init: float | None = None
    """Where a search begins; None: the middle."""
    step: float | None = None
    """Spacing of the allowed values, counted from `low`; None: any value."""
    choices: tuple[Value, ...] = ()
    """Allowed values in order, instead of bounds."""

    @property
    def num_values(self) -> int | None:
        """How many values there are to choose from; None for any value between the bounds."""
        if self.choices:
            return len(self.choices)
        return None if self.step is None else math.floor((self.high - self.low) / self.step + 1e-9) + 1

    def value(self, coordinate: float) -> Value:
        """What a coordinate in [0, 1] stands for: the cube is cut into equal parts where values are few."""
        share = min(max(coordinate, 0.0), 1.0)
        if self.num_values is None:
            return min(max(self.low + share * (self.high - self.low), self.low), self.high)
        index = min(int(share * self.num_values), self.num_values - 1)
        if self.choices:
            return self.choices[index]
        assert self.step is not None
        return round(self.low + index * self.step, 12)

    def coordinate(self, value: Value) -> float:
        """A coordinate that stands for `value`, or for the nearest allowed one."""
        if self.choices:
            return (self.choices.index(value) + 0.5) / len(self.choices)
        number = float(value)
        if self.num_values is None or self.step is None:
            return (number - self.low) / (self.high - self.low)
        index = min(max(round((number - self.low) / self.step), 0), self.num_values - 1)
        return (index + 0.5) / self.num_values

    @property
    def start(self) -> Value:
        """The value a search begins with."""
        if self.choices:
            return self.choices[0] if self.init is None else self.choices[int(self.init)]
        return self.value(self.coordinate((self.low + self.high) / 2 if self.init is None else self.init))


@dataclass(frozen=True)
class SearchSpace:
    """All genes of a search."""

    genes: tuple[Gene, ...]
    same: "Callable[[tuple[Value, ...]], tuple[Value, ...]] | None" = None
    """Of all values that stand for one candidate the first, where several can."""

    @property
    def counts(self) -> tuple[int, ...]:
        """How many values each gene has. Raises ValueError where that is any number between two."""
        endless = [gene.name for gene in self.genes if gene.num_values is None]
        if endless:
            raise ValueError(f"{endless[0]} has no `step`, so it has too many values for a grid")
        return tuple(gene.num_values or 0 for gene in self.genes)

    def values(self, point: Sequence[float]) -> tuple[Value, ...]:
        """The values of every gene at a point of the unit cube."""
        values = tuple(gene.value(coordinate) for gene, coordinate in zip(self.genes, point, strict=True))
        return values if self.same is None else self.same(values)

    def point(self, values: Sequence[Value]) -> Point:
        """A point that stands for these values."""
        return tuple(gene.coordinate(value) for gene, value in zip(self.genes, values, strict=True))

    def snap(self, point: Sequence[float]) -> Point:
        """The representative of all points that mean the same as this one."""
        return self.point(self.values(point))

    @property
    def start(self) -> tuple[Value, ...]:
        """Where a search begins."""
        return tuple(gene.start for gene in self.genes)

    @property
    def corners(self) -> list[tuple[Value, ...]]:
        """Where a search begins, and the lowest and the highest values of all genes; every choice occurs."""
        ends = [tuple(gene.value(share) for gene in self.genes) for share in (0.0, 1.0)]
        longest = max((len(gene.choices) for gene in self.genes), default=0)
        chosen = [
            tuple(gene.choices[turn % len(gene.choices)] if gene.choices else gene.start for gene in self.genes)
            for turn in range(longest)
        ]
        return [self.start, *ends, *chosen]
