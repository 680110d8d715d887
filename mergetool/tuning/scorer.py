"""Questions and answers: what does this candidate (or this model) score on these items?

An item is asked of a subject once: what is known already is not asked again, whichever part of the search wanted it.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergetool.engine.processes import Team
from mergetool.errors import EvaluationError, MergeError, MergetoolError, PlanError, RecipeError
from mergetool.evaluate.cache import ResponseCache
from mergetool.evaluate.items import Score, TaskItems
from mergetool.search.space import Value
from mergetool.tuning.in_memory import Candidates
from mergetool.tuning.journal import SearchJournal
from mergetool.tuning.responses import collect

Subject = str | tuple[Value, ...]
"""A model of the recipe by name, or a candidate by the values of its genes."""

Ids = Mapping[str, Sequence[int]]
"""Items by task."""

Answers = dict[str, dict[int, Score]]
"""Scores by task and item."""

REPORT = "report"
"""The stage of the final scores."""


@dataclass
class Known:
    """What is known of one subject."""

    scores: dict[str, dict[int, Score]] = field(default_factory=dict)
    failure: str | None = None
    digest: str | None = None
    """Of the merged weights, where that was asked for (in the final report)."""


@dataclass
class Spent:
    """What a search cost."""

    items: dict[str, int] = field(default_factory=dict)
    """Items answered, by stage."""
    recalled: int = 0
    """Of them, those that an earlier run had answered."""
    asked: int = 0
    """And those that were answered now."""
    requests: int = 0
    merge_seconds: float = 0.0
    evaluate_seconds: float = 0.0


class Scorer:
    """Scores subjects, and keeps what it learnt."""

    def __init__(
        self,
        candidates: Candidates,
        tasks: Sequence[TaskItems],
        journal: SearchJournal,
        *,
        team: Team,
        cache: ResponseCache,
        count: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._candidates = candidates
        self.tasks = {task.name: task for task in tasks}
        self._journal, self._team, self._cache, self._count = journal, team, cache, count
        self._known: dict[Subject, Known] = {}
        self.spent = Spent()

    def scores(self, subject: Subject, ids: Ids, stage: str) -> Answers | None:
        """`scores_of_all` of one subject."""
        return self.scores_of_all([subject], ids, stage)[0]

    def scores_of_all(self, subjects: Sequence[Subject], ids: Ids, stage: str) -> list[Answers | None]:
        """Scores of these items by task, for each subject; None for a candidate that could not be merged or evaluated.

        Raises EvaluationError for a model of the recipe that cannot be evaluated.
        """
        waiting = []
        for subject in dict.fromkeys(subjects):
            left = self._recalled(subject, self._missing(subject, ids), stage)
            if left or (stage == REPORT and self._lacks_digest(subject)):
                waiting.append((subject, left))
        for start in range(0, len(waiting), self._team.size):
            self._ask_together(waiting[start : start + self._team.size], stage)
        return [self.known(subject, ids) for subject in subjects]

    def known(self, subject: Subject, ids: Ids) -> Answers | None:
        """Scores of these items if all of them are known; nobody is asked."""
        if self._missing(subject, ids) or self.failure(subject) is not None:
            return None
        scores = self._known[subject].scores
        return {task: {item: scores[task][item] for item in wanted} for task, wanted in ids.items()}

    def collect(self, models: Sequence[str], path: Path) -> None:
        """Write down what the cache knows of these tasks from others than these models."""
        collect(self._cache, list(self.tasks.values()), {self._candidates.identity(name) for name in models}, path)

    def failure(self, subject: Subject) -> str | None:
        """Why a candidate failed, or None."""
        return self._known[subject].failure if subject in self._known else None

    def digest(self, subject: Subject) -> str | None:
        """The digest of the weights that got the final score."""
        return self._known[subject].digest

    def _lacks_digest(self, subject: Subject) -> bool:
        return not isinstance(subject, str) and self.failure(subject) is None and self.digest(subject) is None

    def _missing(self, subject: Subject, ids: Ids) -> dict[str, list[int]]:
        """Items that this subject was not asked yet; none of one that failed."""
        known = self._known.get(subject, Known())
        if known.failure is not None:
            return {}
        missing = {t: [item for item in wanted if item not in known.scores.get(t, {})] for t, wanted in ids.items()}
        return {task: items for task, items in missing.items() if items}

    def _recalled(self, subject: Subject, wanted: Mapping[str, list[int]], stage: str) -> dict[str, list[int]]:
        """Take over what the subject answered in an earlier run. Returns the items that are left to be asked."""
        kept = self._journal.kept.of(self._candidates.identity(subject))
        known = self._known.get(subject)
        if known is None:
            known = self._known[subject] = Known(digest=kept.digest)
            self._spend_seconds(kept.seconds)
        left = {}
        for task, items in wanted.items():
            keys = self.tasks[task].keys
            recalled = {item: kept.scores[keys[item]] for item in items if keys[item] in kept.scores}
            known.scores.setdefault(task, {}).update(recalled)
            self._spend_items(stage, task, list(recalled))
            self.spent.recalled += len(recalled)
            if asked := [item for item in items if item not in recalled]:
                left[task] = asked
        if left and kept.failure is not None:
            known.failure, left = kept.failure, {}
        return left

    def _ask_together(self, asked: Sequence[tuple[Subject, dict[str, list[int]]]], stage: str) -> None:
        """Every process asks one question; all of them learn all answers, in order."""
        own: dict[str, Any] | EvaluationError | None = None
        if self._team.rank < len(asked):
            try:
                own = self._ask(*asked[self._team.rank], digest=stage == REPORT)
            except EvaluationError as error:
                own = error
        for (subject, missing), answer in zip(asked, self._team.all_gather(own), strict=False):
            if isinstance(answer, EvaluationError):
                raise answer
            question = [stage, subject if isinstance(subject, str) else list(subject), missing]
            record = self._journal.record(question, self._candidates.identity(subject), **answer)
            self._learn(subject, missing, stage, record)

    def _learn(self, subject: Subject, missing: Mapping[str, list[int]], stage: str, record: Mapping[str, Any]) -> None:
        known = self._known[subject]
        known.failure = record.get("failure")
        known.digest = record.get("digest", known.digest)
        for task, (values, softs) in record.get("scores", {}).items():
            pairs = zip(missing[task], values, softs, strict=True)
            known.scores.setdefault(task, {}).update({item: Score(value, soft) for item, value, soft in pairs})
            self._spend_items(stage, task, missing[task])
            self.spent.asked += len(missing[task])
        self._spend_seconds(record["seconds"])

    def _spend_items(self, stage: str, task: str, items: Sequence[int]) -> None:
        """Count answers, whether they were given now or in an earlier run: that is what this search takes."""
        if items:
            self.spent.items[stage] = self.spent.items.get(stage, 0) + len(items)
            self.spent.requests += self.tasks[task].num_requests(items)
            self._count(len(items))

    def _spend_seconds(self, seconds: Sequence[float]) -> None:
        self.spent.merge_seconds += seconds[0]
        self.spent.evaluate_seconds += seconds[1]

    def _ask(self, subject: Subject, missing: Mapping[str, list[int]], *, digest: bool) -> dict[str, Any]:
        """Merge and evaluate; what goes wrong with a candidate is an answer, too."""
        started = merged = time.monotonic()
        marked = {}
        try:
            cached = {task: self._cached(subject, task, items) for task, items in missing.items()}
            if digest or any(len(cached[task]) < len(items) for task, items in missing.items()):
                marked = {"digest": made} if (made := self._put(subject, digest=digest)) else {}
            merged = time.monotonic()
            scores = {task: self._scored(subject, task, items, cached[task]) for task, items in missing.items()}
        except (MergeError, PlanError, RecipeError, EvaluationError, RuntimeError) as error:
            if isinstance(subject, str):
                raise _of_model(subject, error) from error
            reason = error.what if isinstance(error, MergetoolError) else str(error).strip().splitlines()[0]
            return {"failure": reason[:300], "seconds": [round(merged - started, 4), 0.0]}
        seconds = [round(merged - started, 4), round(time.monotonic() - merged, 4)]
        lists = {
            task: [[_plain(part[item].value) for item in missing[task]], [part[item].soft for item in missing[task]]]
            for task, part in scores.items()
        }
        return {"scores": lists, **marked, "seconds": seconds}

    def _cached(self, subject: Subject, task: str, items: Sequence[int]) -> dict[int, Score]:
        keys = self.tasks[task].keys
        cached = self._cache.get(self._candidates.identity(subject), [keys[item] for item in items])
        return {item: cached[keys[item]] for item in items if keys[item] in cached}

    def _scored(self, subject: Subject, task: str, items: Sequence[int], cached: dict[int, Score]) -> dict[int, Score]:
        """Ask the live model what the cache does not know."""
        left = [item for item in items if item not in cached]
        if left:
            keys = self.tasks[task].keys
            asked = self.tasks[task].score(self._candidates.live.lm, left)
            self._cache.put(self._candidates.identity(subject), {keys[item]: score for item, score in asked.items()})
            cached |= asked
        return cached

    def _put(self, subject: Subject, *, digest: bool) -> str | None:
        if not isinstance(subject, str):
            return self._candidates.put(subject, digest=digest)
        self._candidates.put_model(subject)
        return None


def _plain(value: float) -> float | int:
    """0 and 1 are most values: shorter as whole numbers."""
    return int(value) if math.isfinite(value) and value == int(value) else value


def _of_model(name: str, error: Exception) -> EvaluationError:
    if isinstance(error, MergetoolError):
        return EvaluationError(error.what, f"model {name!r}: {error.where}", error.fix)
    return EvaluationError(str(error).strip().splitlines()[0], f"model {name!r}", "look at it: mergetool verify")
