"""The search itself: calibration, generations of candidates, re-ranking of the best, one final score.

calibration    models and random merges answer all search items: the subset and the estimators come from that
generations    every candidate answers the subset; the engine is told the estimates
re-ranking     the best few answer all search items: estimates favour the lucky
report         the winner, the models and the start of the search answer items that nobody saw before
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
from numpy.typing import NDArray

from mergetool.evaluate.items import Score
from mergetool.methods.families.judged import JudgedSearch
from mergetool.search.engines import make_engine
from mergetool.search.estimate import Estimate
from mergetool.search.pareto import front
from mergetool.search.space import Point, SearchSpace, Value
from mergetool.tuning.calibration import Extract, Prepared
from mergetool.tuning.responses import Rows
from mergetool.tuning.scorer import REPORT, Scorer, Subject
from mergetool.tuning.splits import Splits

Floats = NDArray[np.float64]
Values = tuple[Value, ...]
CALIBRATION = -1
"""The generation of candidates that were tried before the first one."""


@dataclass(frozen=True)
class Trial:
    """One candidate as the engine saw it."""

    generation: int
    values: Values
    estimates: tuple[Estimate, ...] | None
    """One per task; None if it failed."""
    fitness: float
    """Weighted mean of the estimates, without the penalty; minus infinity if it failed."""


@dataclass
class History:
    """Everything a search saw, in order."""

    prepared: dict[str, Prepared] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    finalists: dict[Values, tuple[float, ...]] = field(default_factory=dict)
    """Scores on all search items, one per task, of those that were re-ranked."""
    report: dict[Subject, tuple[float, ...]] = field(default_factory=dict)
    """Scores on the report items."""
    winner: Values | None = None
    front: list[Values] = field(default_factory=list)
    """With several objectives: finalists that no other one beats in all of them."""


class Loop:
    """One search. Deterministic in the recipe, the seed and the answers."""

    def __init__(
        self,
        method: JudgedSearch,
        space: SearchSpace,
        scorer: Scorer,
        splits: Splits,
        seed: int,
        say: Callable[[str], None],
        others: Rows | None = None,
    ) -> None:
        self._method, self._space, self._scorer, self._splits, self._seed = method, space, scorer, splits, seed
        self._say, self._others = say, others
        self.weights = np.array([task.weight for task in method.tasks]) / sum(task.weight for task in method.tasks)
        self.several = method.search.algorithm == "nsga2" and len(method.tasks) > 1
        self.history = History()

    def run(self, models: Sequence[str], base: str | None) -> History:
        """Calibrate, search, re-rank, report. Raises EvaluationError where a model of the recipe fails."""
        self._extract(models, base)
        search = self._method.search
        engine = make_engine(
            search.algorithm,
            len(self._space.genes),
            search.population,
            seeds=self._seeds(),
            seed=self._seed,
            snap=self._space.snap,
            counts=self._space.counts if search.algorithm == "grid" else (),
        )
        for generation in range(search.generations) if search.generations_matter else count():
            points = engine.ask()
            if not points:
                break
            trials = self._try(generation, [self._space.values(point) for point in points])
            engine.tell(points, self._scores(trials))
            best = max(self.history.trials, key=lambda trial: trial.fitness)
            last = f" of {search.generations}" if search.generations_matter else ""
            self._say(f"generation {generation + 1}{last}: best estimate {best.fitness:.4f}")
        self._rerank()
        if self.history.winner is not None:
            self._report(self.history.winner, [*([base] if base else []), *models])
        return self.history

    def _extract(self, models: Sequence[str], base: str | None) -> None:
        extract = Extract(self._method.estimator, self._space, self._scorer, self._splits, self._seed, self._others)
        self.history.prepared = extract.run(models, base)
        for task, prepared in self.history.prepared.items():
            asked, used = self._method.estimator.kind, prepared.estimator.kind
            if prepared.check is not None and used != asked:
                self._say(f"{task}: {asked} is no better than the weighted mean on held-out merges; the mean is used")
        self._try(CALIBRATION, [who for who in extract.calibration if not isinstance(who, str)])

    def _seeds(self) -> list[Point]:
        """Points that are known already, best first; at least the start of the search."""
        known = sorted(self.history.trials, key=lambda trial: -trial.fitness)
        values = dict.fromkeys([*(trial.values for trial in known), self._space.start])
        return [self._space.point(genome) for genome in values]

    def _try(self, generation: int, candidates: Sequence[Values]) -> list[Trial]:
        ids = {task: prepared.ids for task, prepared in self.history.prepared.items()}
        answered = self._scorer.scores_of_all(candidates, ids, "search")
        trials = [self._trial(generation, who, scores) for who, scores in zip(candidates, answered, strict=True)]
        self.history.trials += trials
        return trials

    def _trial(self, generation: int, values: Values, scores: dict[str, dict[int, Score]] | None) -> Trial:
        if scores is None:
            return Trial(generation, values, None, -np.inf)
        estimates = tuple(prepared(scores[task]) for task, prepared in self.history.prepared.items())
        fitness = float(self.weights @ np.array([estimate.value for estimate in estimates]))
        return Trial(generation, values, estimates, fitness - self._method.penalty(values))

    def _scores(self, trials: Sequence[Trial]) -> Floats:
        """What the engine is told: one number, or one per task; a failed candidate is worse than any other."""
        seen = [value for trial in self.history.trials for value in _seen(trial)]
        worst = min(seen, default=0.0) - 0.1
        if self.several:
            size = len(self.weights)
            return np.array([[e.value for e in t.estimates] if t.estimates else [worst] * size for t in trials])
        return np.array([[trial.fitness if trial.estimates else worst] for trial in trials])

    def _rerank(self) -> None:
        """Compare the best on all search items."""
        candidates = self._finalists()
        answered = self._scorer.scores_of_all(candidates, self._splits.search, "re-ranking")
        for values, scores in zip(candidates, answered, strict=True):
            if scores is not None:
                self.history.finalists[values] = tuple(_mean(part) for part in scores.values())
        if not self.history.finalists:
            return
        finalists = list(self.history.finalists)
        scores_of = np.array([self.history.finalists[values] for values in finalists])
        penalties = np.array([self._method.penalty(values) for values in finalists])
        self.history.winner = finalists[int(np.argmax(scores_of @ self.weights - penalties))]
        if self.several:
            self.history.front = [finalists[place] for place in front(scores_of)]

    def _finalists(self) -> list[Values]:
        """The candidates with the best estimates; with several objectives, spread along their front."""
        known = {trial.values: trial for trial in self.history.trials if trial.estimates}
        most = self._method.search.rerank
        order = sorted(known, key=lambda values: -known[values].fitness)
        if not self.several:
            return order[:most]
        estimates = np.array([[e.value for e in known[values].estimates or ()] for values in order])
        along = front(estimates) if order else []
        places = sorted({round(place) for place in np.linspace(0, len(along) - 1, min(most, len(along)))})
        return list(dict.fromkeys([*order[:1], *(order[along[place]] for place in places)]))

    def _report(self, winner: Values, models: Sequence[str]) -> None:
        """Score the winner (or front), the models and the start once, on items that took no part in the search."""
        asked: list[Subject] = [winner, *self.history.front, *models, self._space.start]
        subjects = list(dict.fromkeys(asked))
        answered = self._scorer.scores_of_all(subjects, self._splits.report, REPORT)
        for subject, scores in zip(subjects, answered, strict=True):
            if scores is not None:
                self.history.report[subject] = tuple(_mean(part) for part in scores.values())


def _seen(trial: Trial) -> list[float]:
    """The numbers that a trial may have been told by."""
    return [*(estimate.value for estimate in trial.estimates), trial.fitness] if trial.estimates else []


def _mean(scores: dict[int, Score]) -> float:
    return float(np.mean([score.value for score in scores.values()]))
