"""The search itself: generations of candidates, re-ranking of the best, one final score.

generations    every candidate answers the items of the estimator; the engine is told the estimates
re-ranking     the best few answer all search items: estimates favour the lucky
report         the winner, the models and the start of the search answer items that nobody saw before
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mergetool.evaluate.items import Score
from mergetool.evolve.judge import Judge, Subject
from mergetool.evolve.pools import Pools
from mergetool.methods.merge3 import Merge3
from mergetool.search.engines import Engine, RandomSearch, SobolSearch
from mergetool.search.space import Point, Space, Value

Floats = NDArray[np.float64]
Values = tuple[Value, ...]


@dataclass(frozen=True)
class Trial:
    """One candidate as the engine saw it."""

    generation: int
    values: Values
    estimates: tuple[float, ...] | None
    """One per task; None if it failed."""
    fitness: float


@dataclass
class History:
    """Everything a search saw, in order."""

    trials: list[Trial] = field(default_factory=list)
    finalists: dict[Values, tuple[float, ...]] = field(default_factory=dict)
    """Scores on all search items, one per task, of those that were re-ranked."""
    report: dict[Subject, tuple[float, ...]] = field(default_factory=dict)
    """Scores on the report items."""
    winner: Values | None = None


class Loop:
    """One search. Deterministic in the recipe, the seed and the answers."""

    def __init__(
        self, method: Merge3, space: Space, judge: Judge, pools: Pools, seed: int, say: Callable[[str], None]
    ) -> None:
        self._method, self._space, self._judge, self._pools, self._seed = method, space, judge, pools, seed
        self._say = say
        self.weights = np.array([task.weight for task in method.tasks]) / sum(task.weight for task in method.tasks)
        self.history = History()

    def run(self, models: Sequence[str]) -> History:
        """Search, re-rank, report."""
        search = self._method.search
        engine = self._engine([self._space.point(self._space.start)])
        for generation in range(search.generations):
            points = [self._space.snap(point) for point in engine.ask()]
            trials = [self._try(generation, point) for point in points]
            self.history.trials += trials
            engine.tell(points, self._scores(trials))
            best = max(self.history.trials, key=lambda trial: trial.fitness)
            self._say(f"generation {generation + 1} of {search.generations}: best estimate {best.fitness:.4f}")
        self._rerank()
        self._report(models)
        return self.history

    def _engine(self, seeds: Sequence[Point]) -> Engine:
        search = self._method.search
        kinds = {"random": RandomSearch, "sobol": SobolSearch}
        return kinds[search.algorithm](len(self._space.genes), search.population, seeds, self._seed)

    def _try(self, generation: int, point: Point) -> Trial:
        values = self._space.values(point)
        scores = self._judge.scores(values, self._pools.search, "search")
        if scores is None:
            return Trial(generation, values, None, -np.inf)
        estimates = tuple(_mean(part) for part in scores.values())
        return Trial(generation, values, estimates, float(self.weights @ np.array(estimates)))

    def _scores(self, trials: Sequence[Trial]) -> Floats:
        """What the engine is told: a failed candidate is worse than any other."""
        seen = [trial.fitness for trial in self.history.trials if np.isfinite(trial.fitness)]
        worst = min(seen, default=0.0) - 0.1
        return np.array([[trial.fitness if np.isfinite(trial.fitness) else worst] for trial in trials])

    def _rerank(self) -> None:
        """Compare the best on all search items."""
        fitness = {trial.values: trial.fitness for trial in self.history.trials if np.isfinite(trial.fitness)}
        order = sorted(fitness, key=lambda values: -fitness[values])
        for values in order[: self._method.search.rerank]:
            scores = self._judge.scores(values, self._pools.search, "re-ranking")
            if scores is not None:
                self.history.finalists[values] = tuple(_mean(part) for part in scores.values())
        finalists = self.history.finalists
        if finalists:
            self.history.winner = max(finalists, key=lambda values: float(self.weights @ np.array(finalists[values])))

    def _report(self, models: Sequence[str]) -> None:
        """Score the winner, the models and the start once, on items that took no part in the search."""
        subjects: list[Subject] = [*([self.history.winner] if self.history.winner else []), *models, self._space.start]
        for subject in subjects:
            scores = self._judge.scores(subject, self._pools.report, "report")
            if scores is not None:
                self.history.report[subject] = tuple(_mean(part) for part in scores.values())


def _mean(scores: dict[int, Score]) -> float:
    return float(np.mean([score.value for score in scores.values()]))
