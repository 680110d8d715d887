"""Who proposes candidates: optimisers behind one protocol.

    points = engine.ask()             the next generation, in the unit cube
    engine.tell(points, scores)       what they were worth: one row a point, one column an objective, higher is better

An engine draws from a generator of its own, so that the same seed and the same scores give the same points whatever
else draws random numbers. `seeds` are points that a search knows already; engines begin with them.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from mergetool.search.space import Point

Scores = NDArray[np.float64]


class Engine(Protocol):
    """An optimiser that asks for scores."""

    def ask(self) -> list[Point]: ...

    def tell(self, points: Sequence[Point], scores: Scores) -> None: ...


def sobol_points(num_points: int, num_genes: int, seed: int) -> list[Point]:
    """The first points of a scrambled Sobol sequence: they fill the cube evenly."""
    if num_points == 0:
        return []
    power = max(1, (num_points - 1).bit_length())
    drawn = qmc.Sobol(num_genes, scramble=True, rng=np.random.default_rng(seed)).random_base2(power)
    return [tuple(map(float, point)) for point in drawn[:num_points]]


class RandomSearch:
    """Independent uniform points; the seeds first."""

    def __init__(self, num_genes: int, population: int, seeds: Sequence[Point], seed: int) -> None:
        self._num_genes, self._population = num_genes, population
        self._rng = np.random.default_rng(seed)
        self._waiting = list(seeds)

    def ask(self) -> list[Point]:
        drawn = self._rng.random((self._population, self._num_genes))
        points = [*self._waiting, *(tuple(map(float, point)) for point in drawn)]
        self._waiting = points[self._population : max(self._population, len(self._waiting))]
        return points[: self._population]

    def tell(self, points: Sequence[Point], scores: Scores) -> None:
        pass


class SobolSearch(RandomSearch):
    """Evenly spread points; the seeds first."""

    def __init__(self, num_genes: int, population: int, seeds: Sequence[Point], seed: int) -> None:
        super().__init__(num_genes, population, seeds, seed)
        self._sequence = qmc.Sobol(num_genes, scramble=True, rng=self._rng)

    def ask(self) -> list[Point]:
        taken, self._waiting = self._waiting[: self._population], self._waiting[self._population :]
        missing = self._population - len(taken)
        return [*taken, *(tuple(map(float, point)) for point in self._sequence.random(missing))]
