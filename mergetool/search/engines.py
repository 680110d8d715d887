"""Who proposes candidates: optimisers behind one protocol.

    points = engine.ask()             the next generation, in the unit cube
    engine.tell(points, scores)       what they were worth: one row a point, one column an objective, higher is better

An engine that has asked all that it wants asks for no more points (`choosers`).

An engine draws from a generator of its own, so that the same seed and the same scores give the same points whatever
else draws random numbers. `seeds` are points that a search knows already, best first; engines begin with them.

Reference: Hansen, The CMA Evolution Strategy: A Tutorial, 2016, https://arxiv.org/abs/1604.00772 (cma-es, by `cmaes`);
Deb et al., A fast and elitist multiobjective genetic algorithm: NSGA-II, 2002 (nsga2 and ga, by `pymoo`).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from mergetool.search.choosers import Greedy, Grid
from mergetool.search.space import Point
from mergetool.search.tpe import proposal

Scores = NDArray[np.float64]
Snap = Callable[[Sequence[float]], Point]
"""The representative of all points that mean the same."""

STARTUP = 10
"""Points that `tpe` has seen before it proposes any."""
INSTALL = 'pip install "mergetool[search]"'


class Engine(Protocol):
    """An optimiser that asks for scores."""

    def ask(self) -> list[Point]: ...

    def tell(self, points: Sequence[Point], scores: Scores) -> None: ...


def make_engine(
    algorithm: str,
    num_genes: int,
    population: int,
    *,
    seeds: Sequence[Point],
    seed: int,
    snap: Snap,
    counts: Sequence[int] = (),
) -> Engine:
    """An engine by name; `counts`, for a grid, tells how many values each gene has.

    Raises ModuleNotFoundError where its library is not installed.
    """
    if algorithm == "greedy":
        return Greedy(num_genes)
    if algorithm == "grid":
        return Grid(counts, population)
    if algorithm == "tpe":
        return Tpe(num_genes, population, seeds, seed)
    if algorithm in ("random", "sobol"):
        kind = RandomSearch if algorithm == "random" else SobolSearch
        return kind(num_genes, population, seeds, seed)
    if algorithm == "cma-es":
        return CmaEs(num_genes, population, seeds, seed)
    return Genetic(algorithm, num_genes, population, seeds=seeds, seed=seed, snap=snap)


def sobol_points(num_points: int, num_genes: int, seed: int) -> list[Point]:
    """The first points of a scrambled Sobol sequence: they fill the cube evenly."""
    if num_points == 0:
        return []
    power = max(1, (num_points - 1).bit_length())
    drawn = qmc.Sobol(num_genes, scramble=True, rng=np.random.default_rng(seed)).random_base2(power)
    return [_point(row) for row in drawn[:num_points]]


def _point(row: Iterable[float]) -> Point:
    return tuple(float(coordinate) for coordinate in row)


class RandomSearch:
    """Independent uniform points; the seeds first."""

    def __init__(self, num_genes: int, population: int, seeds: Sequence[Point], seed: int) -> None:
        self._num_genes, self._population = num_genes, population
        self._rng = np.random.default_rng(seed)
        self._waiting = list(seeds)

    def ask(self) -> list[Point]:
        taken, self._waiting = self._waiting[: self._population], self._waiting[self._population :]
        return [*taken, *(_point(row) for row in self._more(self._population - len(taken)))]

    def _more(self, count: int) -> Scores:
        return self._rng.random((count, self._num_genes))

    def tell(self, points: Sequence[Point], scores: Scores) -> None:
        pass


class SobolSearch(RandomSearch):
    """Evenly spread points; the seeds first."""

    def __init__(self, num_genes: int, population: int, seeds: Sequence[Point], seed: int) -> None:
        super().__init__(num_genes, population, seeds, seed)
        self._sequence = qmc.Sobol(num_genes, scramble=True, rng=self._rng)
        power = max(1, (population - 1).bit_length())
        self._drawn = list(self._sequence.random_base2(power))

    def _more(self, count: int) -> Scores:
        while len(self._drawn) < count:
            self._drawn += list(self._sequence.random(len(self._drawn) or 1))
        taken, self._drawn = self._drawn[:count], self._drawn[count:]
        return np.array(taken)


class Tpe(SobolSearch):
    """Where good points lie thick and others thin; evenly spread ones first."""

    def __init__(self, num_genes: int, population: int, seeds: Sequence[Point], seed: int) -> None:
        super().__init__(num_genes, population, seeds, seed)
        self._points: list[Point] = []
        self._scores: list[float] = []

    def ask(self) -> list[Point]:
        if len(self._points) < STARTUP:
            return super().ask()
        return [proposal(self._points, np.array(self._scores), self._rng) for _ in range(self._population)]

    def tell(self, points: Sequence[Point], scores: Scores) -> None:
        self._points += points
        self._scores += scores.mean(axis=1).tolist()


class CmaEs:
    """A normal distribution that moves and stretches towards what was good. It begins around the best seed."""

    def __init__(self, num_genes: int, population: int, seeds: Sequence[Point], seed: int) -> None:
        from cmaes import CMA

        self._num_genes = num_genes
        self._seed = seed % 2**32
        mean = np.array(seeds[0]) if seeds else np.full(num_genes, 0.5)
        bounds = np.tile([0.0, 1.0], (num_genes, 1))
        self._population = max(2, population)
        self._make: Callable[..., Any] = lambda centre, sigma, turn: CMA(
            mean=centre, sigma=sigma, bounds=bounds, seed=self._seed + turn, population_size=self._population
        )
        self._restarts = 0
        self._optimizer = self._make(mean, 0.25, 0)
        self._asked: list[NDArray[np.float64]] = []

    def ask(self) -> list[Point]:
        if self._optimizer.should_stop():  # converged: look elsewhere
            self._restarts += 1
            rng = np.random.default_rng([self._seed, self._restarts])
            self._optimizer = self._make(rng.random(self._num_genes), 0.25, self._restarts)
        self._asked = [self._optimizer.ask() for _ in range(self._population)]
        return [_point(np.clip(x, 0.0, 1.0)) for x in self._asked]

    def tell(self, points: Sequence[Point], scores: Scores) -> None:
        losses = -scores.mean(axis=1)
        self._optimizer.tell([(x, float(loss)) for x, loss in zip(self._asked, losses, strict=True)])


class Genetic:
    """A population that crosses and mutates: `ga` for one objective, `nsga2` for several."""

    def __init__(
        self, algorithm: str, num_genes: int, population: int, *, seeds: Sequence[Point], seed: int, snap: Snap
    ) -> None:
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.algorithms.soo.nonconvex.ga import GA
        from pymoo.core.problem import Problem
        from pymoo.core.repair import Repair
        from pymoo.core.termination import NoTermination

        class OnGrid(Repair):  # type: ignore[misc]
            """After every variation: children stand for allowed values, so that equal ones are seen to be equal."""

            def _do(self, problem: Any, X: Any, **_: Any) -> Any:  # noqa: N803
                return np.array([snap(x) for x in X])

        first = list(dict.fromkeys(snap(x) for x in (*seeds, *sobol_points(4 * population, num_genes, seed))))
        kind = {"ga": GA, "nsga2": NSGA2}[algorithm]
        self._make: Callable[..., Any] = lambda: kind(
            pop_size=population, sampling=np.array(first[:population]), repair=OnGrid(), eliminate_duplicates=True
        )
        self._problem: Callable[..., Any] = lambda objectives: Problem(
            n_var=num_genes, n_obj=objectives, xl=0.0, xu=1.0
        )
        self._termination = NoTermination()
        self._seed = seed % 2**32
        self._first: list[Point] | None = first[:population]
        self._algorithm: Any = None
        self._asked: Any = None

    def ask(self) -> list[Point]:
        if self._first is not None:
            return self._first
        self._asked = self._algorithm.ask()
        return [_point(x) for x in self._asked.get("X")]

    def tell(self, points: Sequence[Point], scores: Scores) -> None:
        if self._first is not None:  # only now is it known how many objectives there are
            self._first = None
            self._algorithm = self._make()
            self._algorithm.setup(
                self._problem(scores.shape[1]), termination=self._termination, seed=self._seed, verbose=False
            )
            self._asked = self._algorithm.ask()
        self._asked.set("F", -scores)
        self._algorithm.tell(infills=self._asked)
