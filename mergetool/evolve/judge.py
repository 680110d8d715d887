"""Questions and answers: what does this candidate (or this model) score on these items?

An item is asked of a subject once: what is known already is not asked again, whichever part of the search wanted it.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergetool.errors import EvaluationError, MergeError, MergetoolError, PlanError, RecipeError
from mergetool.evaluate.items import Score, TaskItems
from mergetool.evolve.journal import SearchJournal
from mergetool.evolve.live import Candidates
from mergetool.search.space import Value

Subject = str | tuple[Value, ...]
"""A model of the recipe by name, or a candidate by the values of its genes."""

Ids = Mapping[str, Sequence[int]]
"""Items by task."""


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
    requests: int = 0
    merge_seconds: float = 0.0
    evaluate_seconds: float = 0.0

    @property
    def total_items(self) -> int:
        return sum(self.items.values())


class Judge:
    """Scores subjects, and keeps what it learnt."""

    def __init__(self, candidates: Candidates, tasks: Sequence[TaskItems], journal: SearchJournal) -> None:
        self._candidates = candidates
        self.tasks = {task.name: task for task in tasks}
        self._journal = journal
        self._known: dict[Subject, Known] = {}
        self.spent = Spent()

    def scores(self, subject: Subject, ids: Ids, stage: str) -> dict[str, dict[int, Score]] | None:
        """Scores of these items by task; None for a candidate that could not be merged or evaluated.

        Raises EvaluationError for a model of the recipe that cannot be evaluated.
        """
        known = self._known.setdefault(subject, Known())
        missing = {
            task: [item for item in wanted if item not in known.scores.get(task, {})] for task, wanted in ids.items()
        }
        missing = {task: items for task, items in missing.items() if items}
        if known.failure is None and missing:
            self._learn(subject, known, missing, stage)
        if known.failure is not None:
            return None
        return {task: {item: known.scores[task][item] for item in wanted} for task, wanted in ids.items()}

    def scores_of_all(
        self, subjects: Sequence[Subject], ids: Ids, stage: str
    ) -> list[dict[str, dict[int, Score]] | None]:
        """`scores` of several subjects, in their order."""
        return [self.scores(subject, ids, stage) for subject in subjects]

    def known(self, subject: Subject, ids: Ids) -> dict[str, dict[int, Score]] | None:
        """Scores of these items if all of them are known; nobody is asked."""
        known = self._known.get(subject, Known()).scores
        if any(item not in known.get(task, {}) for task, wanted in ids.items() for item in wanted):
            return None
        return {task: {item: known[task][item] for item in wanted} for task, wanted in ids.items()}

    def failure(self, subject: Subject) -> str | None:
        """Why a candidate failed, or None."""
        return self._known[subject].failure if subject in self._known else None

    def digest(self, subject: Subject) -> str | None:
        """The digest of the weights that got the final score."""
        return self._known[subject].digest

    def _learn(self, subject: Subject, known: Known, missing: Mapping[str, list[int]], stage: str) -> None:
        question = [stage, subject if isinstance(subject, str) else list(subject), missing]
        record = self._journal.answer(question)
        if record is None:
            record = self._journal.record(question, **self._ask(subject, missing, digest=stage == "report"))
        known.failure = record.get("failure")
        known.digest = record.get("digest", known.digest)
        for task, (values, softs) in record.get("scores", {}).items():
            pairs = zip(missing[task], values, softs, strict=True)
            known.scores.setdefault(task, {}).update({item: Score(value, soft) for item, value, soft in pairs})
        if known.failure is None:
            count = sum(map(len, missing.values()))
            self.spent.items[stage] = self.spent.items.get(stage, 0) + count
            self.spent.requests += sum(self.tasks[task].num_requests(items) for task, items in missing.items())
        self.spent.merge_seconds += record["seconds"][0]
        self.spent.evaluate_seconds += record["seconds"][1]

    def _ask(self, subject: Subject, missing: Mapping[str, list[int]], *, digest: bool) -> dict[str, Any]:
        """Merge and evaluate; what goes wrong with a candidate is an answer, too."""
        started = merged = time.monotonic()
        found_digest = None
        try:
            found_digest = self._put(subject, digest=digest)
            merged = time.monotonic()
            found = {task: self.tasks[task].score(self._candidates.live.lm, items) for task, items in missing.items()}
        except (MergeError, PlanError, RecipeError, EvaluationError, RuntimeError) as error:
            if isinstance(subject, str):
                raise _of_model(subject, error) from error
            reason = error.what if isinstance(error, MergetoolError) else str(error).strip().splitlines()[0]
            return {"failure": reason[:300], "seconds": [round(merged - started, 4), 0.0]}
        ended = time.monotonic()
        scores = {
            task: [[_plain(part[item].value) for item in missing[task]], [part[item].soft for item in missing[task]]]
            for task, part in found.items()
        }
        marked = {"digest": found_digest} if found_digest else {}
        return {"scores": scores, **marked, "seconds": [round(merged - started, 4), round(ended - merged, 4)]}

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
