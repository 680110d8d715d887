"""How much two models of a recipe take from each other: every pair is merged as the recipe says, and asked.

What a pair keeps of a task is its score over the better of the two alone. Pairs that keep little are better not merged
with each other, or with more care (another method, a lower scale).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from mergetool.analysis.asking import Asking
from mergetool.errors import RecipeError
from mergetool.evaluate.options import TaskOptions
from mergetool.evaluate.scores import TaskScores, retention
from mergetool.recipe import load_recipe
from mergetool.recipe.schema import Recipe

Row = dict[str, Any]


@dataclass(frozen=True)
class PairScores:
    """Every pair of a recipe's models, merged and asked."""

    models: tuple[str, ...]
    alone: tuple[Row, ...]
    """For each model and task: its own score."""
    pairs: tuple[Row, ...]
    """For each pair and task: score, that of the better one alone, and what is kept of it."""

    @property
    def rows(self) -> list[Row]:
        """A row for each pair and task: `pandas.DataFrame(found.rows)`."""
        return list(self.pairs)

    @property
    def matrix(self) -> list[list[float | None]]:
        """What each two keep, in the mean over the tasks; None on the diagonal, and where neither can do any."""
        return [[self._kept(a, b) for b in self.models] for a in self.models]

    def _kept(self, a: str, b: str) -> float | None:
        own = [row["kept"] for row in self.pairs if {row["a"], row["b"]} == {a, b} and a != b]
        known = [each for each in own if each is not None]
        return sum(known) / len(known) if known else None

    def as_dict(self) -> Row:
        """JSON-able data."""
        told = {"models": list(self.models), "alone": list(self.alone), "pairs": list(self.pairs)}
        return told | {"matrix": self.matrix}

    def to_json(self) -> str:
        """All of it, as JSON."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False)


def interference(recipe: Recipe, tasks: Sequence[TaskOptions], **asked: Any) -> PairScores:
    """Merge and score every pair; `asked` is told to `Asking`. Raises RecipeError, EvaluationError."""
    names = tuple(recipe.models)
    if len(names) < 2:
        raise RecipeError("has one model, so there are no pairs", recipe.name, "give a recipe of two models or more")
    recipes = {pair: _of(recipe, pair) for pair in combinations(names, 2)}
    asking = Asking(recipe, tasks, **asked)
    alone = {name: asking.of_model(name) for name in names}
    pairs = [row for pair, each in recipes.items() for row in _rows(pair, asking.of_recipe(each), alone)]
    own = [{"model": name, **scores.facts()} for name, told in alone.items() for scores in told.values()]
    return PairScores(names, tuple(own), tuple(pairs))


def _rows(
    pair: tuple[str, str], merged: Mapping[str, TaskScores], alone: Mapping[str, Mapping[str, TaskScores]]
) -> list[Row]:
    rows = []
    for task, scores in merged.items():
        better = max((alone[name][task] for name in pair), key=lambda each: each.score)
        low, high = scores.difference(better)
        facts = {"a": pair[0], "b": pair[1], **scores.facts(), "better_alone": better.score}
        rows.append(facts | {"kept": retention(scores, better), "difference_low": low, "difference_high": high})
    return rows


def _of(recipe: Recipe, pair: tuple[str, str]) -> Recipe:
    """The same recipe of two of its models. Raises RecipeError where that cannot be."""
    others = recipe.models.keys() - set(pair)
    document = {key: value for key, value in recipe.document.items() if key != "evaluate"}
    document["models"] = {name: recipe.document["models"][name] for name in pair}
    return load_recipe({**document, "merge": _without(document["merge"], others)}, folder=recipe.folder)


def _without(value: Any, names: set[str]) -> Any:
    """Settings without those that are for models of these names."""
    if isinstance(value, Mapping):
        return {key: _without(each, names) for key, each in value.items() if key not in names}
    return value
