"""Scores of a model on tasks, item by item, and what they come to: intervals, retention, calibration."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mergetool.evaluate.reliability import calibration_error, reliability
from mergetool.search.interval import of_difference, of_mean

Values = NDArray[np.float64]
_LEAST = 1e-12
"""No probability counts as less."""
_KEPT = 6
"""Digits of a probability that are kept."""


@dataclass(frozen=True)
class Chances:
    """Where a model chooses among answers, for each item: the probability of the right one, and of the likeliest."""

    right: Values
    likeliest: Values

    @property
    def loss(self) -> float:
        """Mean cross entropy over the choices."""
        return float(-np.log(np.maximum(self.right, _LEAST)).mean())


@dataclass(frozen=True)
class TaskScores:
    """One model on one task."""

    task: str
    metric: str
    items: str
    """SHA-256 of the items' keys: two models with the same have answered the same, in the same way."""
    values: Values
    """A score for each item, in [0, 1]."""
    dataset: Mapping[str, str] = field(default_factory=dict)
    """`id` on the Hub and `config`, where the items are from there."""
    chances: Chances | None = None

    @property
    def score(self) -> float:
        return float(self.values.mean())

    def facts(self) -> dict[str, Any]:
        """The mean, and how far it may be off."""
        low, high = of_mean(self.values)
        facts = {"task": self.task, "metric": self.metric, "items": len(self.values), "score": self.score}
        return facts | {"low": low, "high": high, "ece": self.calibration_error}

    @property
    def reliability(self) -> list[dict[str, Any]]:
        """How often the model is right where it is so sure; nothing where it does not choose, or may be half right."""
        if self.chances is None or not np.isin(self.values, (0.0, 1.0)).all():
            return []
        return reliability(self.values, self.chances.likeliest)

    @property
    def calibration_error(self) -> float | None:
        """The expected calibration error, where it can be told."""
        rows = self.reliability
        return calibration_error(rows) if rows else None

    def is_of_the_same(self, other: "TaskScores") -> bool:
        """Whether both have answered the same items, so that they may be compared item by item."""
        return (self.items, self.metric) == (other.items, other.metric) and len(self.values) == len(other.values)

    def difference(self, other: "TaskScores") -> tuple[float, float]:
        """Interval of how much better this one is, on the same items."""
        return of_difference(self.values, other.values)

    def kept_of(self, parents: Mapping[str, "TaskScores"]) -> dict[str, Any]:
        """What is kept of the best of some parents."""
        best = max(parents, key=lambda name: parents[name].score)
        low, high = self.difference(parents[best])
        return {
            "parents": {name: part.score for name, part in parents.items()},
            "best_parent": best,
            "retention": retention(self, parents[best]),
            "difference_low": low,
            "difference_high": high,
        }

    def as_dict(self) -> dict[str, Any]:
        """To be kept: everything, as JSON-able data."""
        kept: dict[str, Any] = {"task": self.task, "metric": self.metric, "items": self.items}
        kept |= {"values": _short(self.values)} | ({"dataset": dict(self.dataset)} if self.dataset else {})
        if self.chances is not None:
            kept |= {"right": _short(self.chances.right), "likeliest": _short(self.chances.likeliest)}
        return kept

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Self:
        """What `as_dict` has made. Raises ValueError, KeyError or TypeError for anything else."""
        dataset = {str(key): str(value) for key, value in kept.get("dataset", {}).items()}
        chances = Chances(_values(kept["right"]), _values(kept["likeliest"])) if "right" in kept else None
        told = str(kept["task"]), str(kept["metric"]), str(kept["items"])
        return cls(*told, _values(kept["values"]), dataset, chances)


def _short(values: Values) -> list[float]:
    return [round(value, _KEPT) for value in values.tolist()]


def _values(kept: Sequence[Any]) -> Values:
    values = np.array([float(value) for value in kept], dtype=np.float64)
    if not len(values) or not ((values >= 0) & (values <= 1)).all():
        raise ValueError("scores must be in [0, 1]")
    return values


@dataclass(frozen=True)
class Evaluation:
    """A model's scores by task, and those of its parents by what they are called."""

    model: str
    tasks: Mapping[str, TaskScores]
    parents: Mapping[str, Mapping[str, TaskScores]] = field(default_factory=dict)

    def parents_on(self, task: str) -> dict[str, TaskScores]:
        """Parents that have answered the same items of a task."""
        own = self.tasks[task]
        return {
            name: scores[task]
            for name, scores in self.parents.items()
            if task in scores and own.is_of_the_same(scores[task])
        }

    def facts(self) -> dict[str, Any]:
        """What a command tells: a row for each task."""
        rows = []
        for task, scores in self.tasks.items():
            parents = self.parents_on(task)
            rows.append(scores.facts() | (scores.kept_of(parents) if parents else {}))
            if scores.reliability:
                rows[-1]["reliability"] = scores.reliability
        facts: dict[str, Any] = {"model": self.model, "parents": list(self.parents), "tasks": rows}
        kept = [row["retention"] for row in rows if row.get("retention") is not None]
        return facts | ({"retention": summary_of_retention(kept)} if kept else {})

    def joined(self, later: "Evaluation") -> "Evaluation":
        """What was known, and what was found later."""
        names = {*self.parents, *later.parents}
        parents = {name: {**self.parents.get(name, {}), **later.parents.get(name, {})} for name in sorted(names)}
        return Evaluation(later.model, {**self.tasks, **later.tasks}, parents)


def retention(scores: TaskScores, parent: TaskScores) -> float | None:
    """The share of a parent's score that is kept; None where it has none."""
    return scores.score / parent.score if parent.score else None


def summary_of_retention(kept: Sequence[float]) -> dict[str, float]:
    """Of the shares that are kept of several tasks: mean, geometric mean (0 where a task is lost), and the worst."""
    shares = np.array(kept, dtype=np.float64)
    with np.errstate(divide="ignore"):
        geometric = float(np.exp(np.log(shares).mean()))
    return {"mean": float(shares.mean()), "geometric": geometric, "worst": float(shares.min())}


def digest_of_items(keys: Iterable[str]) -> str:
    """One SHA-256 for all items of a task."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()
