"""Scores along a curve of merges: the line between two models, or a recipe while one of its numbers changes.

Every point is merged in memory and asked; nothing is written. The barrier of a curve is how far it rises at most above
the straight line between its ends: two models without one lie in one basin, and their merges lose nothing by averaging.

Reference: Frankle et al. (2020), Linear Mode Connectivity and the Lottery Ticket Hypothesis, arXiv:1912.05671.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergetool.analysis.asking import Asking
from mergetool.errors import EvaluationError
from mergetool.evaluate.options import TaskOptions
from mergetool.evaluate.scores import TaskScores
from mergetool.recipe import load_recipe
from mergetool.recipe.schema import Recipe

Row = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """What became of tasks along a curve."""

    name: str
    """What changes along it."""
    points: tuple[Row, ...]
    """For each point and task: `x`, score and its interval, error (1 - score), and loss where there are choices."""
    barriers: tuple[Row, ...]
    """For each task: the barrier of the error and of the loss, and where; and where the score is best."""

    @property
    def rows(self) -> list[Row]:
        """A row for each point and task: `pandas.DataFrame(curve.rows)`."""
        return list(self.points)

    def as_dict(self) -> Row:
        """JSON-able data."""
        return {"along": self.name, "points": list(self.points), "barriers": list(self.barriers)}

    def to_json(self) -> str:
        """All of it, as JSON."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False)


def line(a: Path, b: Path, num_points: int) -> dict[float, Recipe]:
    """Recipes from one model to another one: x is the share of the second."""
    models = {"a": str(a.absolute()), "b": str(b.absolute())}
    return {
        x: load_recipe({"models": models, "merge": {"method": "linear", "weight": {"a": 1 - x, "b": x}}})
        for x in _spaced(0.0, 1.0, num_points)
    }


def along(
    recipe: Path | Mapping[str, Any], key: str, ends: tuple[float, float], num_points: int
) -> dict[float, Recipe]:
    """A recipe with numbers between these under a dotted key. Raises RecipeError."""
    return {x: load_recipe(recipe, [f"{key}={x}"]) for x in _spaced(*ends, num_points)}


def _spaced(start: float, stop: float, num_points: int) -> list[float]:
    return [float(x) for x in np.linspace(start, stop, num_points)]


def curve(name: str, recipes: Mapping[float, Recipe], tasks: Sequence[TaskOptions], **asked: Any) -> Curve:
    """Merge and score every point; `asked` is told to `Asking`. Raises EvaluationError."""
    asking = Asking(next(iter(recipes.values())), tasks, **asked)
    points = [_point(x, scores) for x, recipe in recipes.items() for scores in asking.of_recipe(recipe).values()]
    return Curve(name, tuple(points), tuple(_barrier(task, points) for task in asking.tasks))


def _point(x: float, scores: TaskScores) -> Row:
    loss = None if scores.chances is None else scores.chances.loss
    return {"x": x, **scores.facts(), "error": 1 - scores.score, "loss": loss}


def _barrier(task: str, points: Sequence[Row]) -> Row:
    """How far a task's error and loss rise above the line between their ends."""
    own = [row for row in points if row["task"] == task]
    xs = [row["x"] for row in own]
    best = max(own, key=lambda row: row["score"])
    told: Row = {"task": task, "best_score": best["score"], "best_at": best["x"]}
    for key in ("error", "loss"):
        values = [row[key] for row in own]
        height, place = (None, None) if None in values else barrier(xs, values)
        told |= {f"{key}_barrier": height, f"{key}_barrier_at": place}
    return told


def barrier(xs: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """How far losses rise at most above the straight line between the first and the last, and where; 0 at the ends."""
    if len(xs) < 2 or xs[0] == xs[-1]:
        raise EvaluationError("a curve of one point has no barrier", "points", "give two points or more: --points 7")
    shares = (np.array(xs) - xs[0]) / (xs[-1] - xs[0])
    above = np.array(losses) - ((1 - shares) * losses[0] + shares * losses[-1])
    above[[0, -1]] = 0.0
    place = int(above.argmax())
    return float(above[place]), float(xs[place])
