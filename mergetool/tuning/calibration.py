"""Before the search: some models answer everything, and from that a subset is chosen and an estimator made per task.

rows       the base, the models, the start of the search and evenly spread random merges, over all search items
others     what models that are no part of the recipe are known to answer, if that is given
subset     the items that candidates will answer
estimator  fitted to all of these; tried on merges held out of the fit, and replaced by the mean where it is no better
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mergetool.errors import EvaluationError
from mergetool.evaluate.items import Score
from mergetool.methods.families.judged import EstimatorOptions
from mergetool.search import subset as subsets
from mergetool.search.engines import sobol_points
from mergetool.search.estimate import CrossCheck, Estimate, Estimator, cross_check, uses_irt, with_fit
from mergetool.search.irt import IrtFit, choose_dimensions, fit
from mergetool.search.space import SearchSpace
from mergetool.tuning.responses import Rows
from mergetool.tuning.scorer import Scorer, Subject
from mergetool.tuning.splits import Splits

Floats = NDArray[np.float64]
Signal = Literal["accuracy", "soft"]
UNKNOWN = Score(np.nan, np.nan)


@dataclass(frozen=True)
class Prepared:
    """How candidates are judged on one task."""

    ids: tuple[int, ...]
    """Items to ask, ascending."""
    estimator: Estimator
    signal: Signal
    check: CrossCheck | None = None
    num_dimensions: int = 0

    def __call__(self, scores: dict[int, Score]) -> Estimate:
        return self.estimator(signals([scores[item] for item in self.ids], self.signal))


def signals(scores: Sequence[Score], signal: Signal) -> Floats:
    """The numbers that guide the search."""
    return np.array([score.soft if signal == "soft" else score.value for score in scores])


class Extract:
    """Everything that happens before the first generation."""

    def __init__(
        self,
        options: EstimatorOptions,
        space: SearchSpace,
        scorer: Scorer,
        splits: Splits,
        seed: int,
        others: Rows | None = None,
    ) -> None:
        self._options, self._space, self._scorer, self._splits, self._seed = options, space, scorer, splits, seed
        self._others = others or {}
        self.calibration: list[Subject] = []
        """Who answered all search items, in order: base, models, start, random merges."""

    def run(self, models: Sequence[str], base: str | None) -> dict[str, Prepared]:
        """Ask, choose, fit. Raises EvaluationError where a model of the recipe cannot be evaluated."""
        if self._options.kind == "full":
            return {task: self._full(pool) for task, pool in self._splits.search.items()}
        self._check_sizes()
        if self._options.needs_answers or self._options.calibration:
            self._ask([*([base] if base else []), *models])
        num_known = len(models) + (base is not None)
        parents = list(range(num_known - len(models), num_known))
        return {task: self._prepare(task, parents, 0 if base else None) for task in self._splits.search}

    def _full(self, pool: Sequence[int]) -> Prepared:
        everything = Estimator("mean", subsets.equal(list(range(len(pool)))), len(pool))
        return Prepared(tuple(pool), everything, self._options.signal)

    def _check_sizes(self) -> None:
        for task, pool in self._splits.search.items():
            wanted = self._options.items
            if self._options.ids is not None:
                given = self._options.ids.get(task, ())
                outside = sorted(set(given) - set(pool))
                if outside or not given:
                    what = f"estimator.ids names items {outside[:5]} that are not search items" if given else "no ids"
                    fix = f"its search items are {pool[0]}, {pool[1]}, ... ({len(pool)} in all; see the journal)"
                    raise EvaluationError(what, f"task {task!r}", fix)
            elif len(pool) < wanted:
                what = f"has {len(pool)} search items, fewer than the {wanted} that a subset shall hold"
                fix = f"set estimator.items to {len(pool) // 2} or less, or estimator.kind: full"
                raise EvaluationError(what, f"task {task!r}", fix)

    def _ask(self, models: Sequence[str]) -> None:
        points = sobol_points(self._options.num_calibration, len(self._space.genes), self._seed)
        merges = [self._space.start] if points else []
        merges += [self._space.values(point) for point in points]
        subjects: list[Subject] = [*models, *dict.fromkeys(merges)]
        answered = self._scorer.scores_of_all(subjects, self._splits.search, "calibration")
        self.calibration = [who for who, scores in zip(subjects, answered, strict=True) if scores is not None]

    def _answers(self, task: str) -> Floats:
        """The calibration models' answers (models, items of the search pool), then those of others; NaN: not asked."""
        pool = self._splits.search[task]
        rows = []
        for subject in self.calibration:
            scores = self._scorer.scores(subject, {task: pool}, "calibration")
            assert scores is not None
            rows.append(signals([scores[task][item] for item in pool], self._options.signal))
        given = ([row.get(item, UNKNOWN) for item in pool] for row in self._others.get(task, ()))
        rows += [signals(scores, self._options.signal) for scores in given]
        return np.array(rows) if rows else np.zeros((0, len(pool)))

    def _prepare(self, task: str, parents: Sequence[int], base: int | None) -> Prepared:
        options, pool = self._options, self._splits.search[task]
        answers = self._answers(task)
        rng = np.random.default_rng([self._seed, len(task), *task.encode()])
        irt, num_dimensions = None, 0
        if uses_irt(options.kind) or (options.subset == "irt" and options.ids is None):  # type: ignore[arg-type]
            asked = options.dimensions
            num_dimensions = choose_dimensions(answers, rng) if asked == "auto" else asked
            irt = fit(answers, num_dimensions)
        chosen = self._subset(pool, task, answers, irt, rng)
        estimator = Estimator(options.kind, chosen, len(pool), span=options.span)  # type: ignore[arg-type]
        ids = tuple(pool[place] for place in chosen.items)
        if not uses_irt(estimator.kind) or irt is None:
            return Prepared(ids, estimator, options.signal)
        check = cross_check(
            estimator,
            answers,
            parents=parents,
            base=base,
            num_dimensions=num_dimensions,
            rng=rng,
            judged=len(self.calibration),
        )
        fitted = replace(with_fit(estimator, irt, parents, base), blend=check.blend)
        if options.guard:
            fitted = replace(fitted, kind=check.kind)
        return Prepared(ids, fitted, options.signal, check, num_dimensions)

    def _subset(
        self, pool: Sequence[int], task: str, answers: Floats, irt: IrtFit | None, rng: np.random.Generator
    ) -> subsets.Subset:
        options = self._options
        if options.ids is not None:
            return subsets.equal([pool.index(item) for item in options.ids[task]])
        if options.subset == "stratified":
            return subsets.stratified(answers, options.items, rng)
        if options.subset == "random" or len(answers) < 2:
            return subsets.random(len(pool), options.items, rng)
        if options.subset == "irt":
            assert irt is not None
            return subsets.by_irt(irt.items, options.items, rng)
        return subsets.by_correctness(answers, options.items, rng)
