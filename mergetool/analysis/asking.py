"""Merges that are made in memory and asked tasks; nothing is written."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mergetool.errors import RecipeError
from mergetool.evaluate.assess import task_scores
from mergetool.evaluate.harness import load_task
from mergetool.evaluate.items import TaskItems
from mergetool.evaluate.options import TaskOptions
from mergetool.evaluate.scores import TaskScores
from mergetool.networks.spread import Spread
from mergetool.planning.build import open_models
from mergetool.planning.sources import Lookup
from mergetool.recipe.schema import Recipe
from mergetool.tensors.source import ModelSource
from mergetool.tuning.in_memory import Candidates


class Asking:
    """The models of a recipe in memory, and tasks; any recipe of these models can be merged and asked.

    `include` of tasks is relative to `folder`. Raises RecipeError for what leaves no checkpoint, EvaluationError.
    """

    def __init__(
        self,
        recipe: Recipe,
        tasks: Sequence[TaskOptions],
        *,
        folder: Path | None = None,
        device: str = "cpu",
        batch_size: int = 32,
        trust_code: bool = False,
        spread: Spread | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        _check(recipe)
        loaded = [load_task(task, folder or Path(), trust_code=trust_code) for task in tasks]
        self._say = say
        self._candidates = Candidates(recipe, _fetched(recipe, say), device, batch_size, spread)
        lm = self._candidates.live.lm
        self.tasks = {o.name: TaskItems(o, task, lm) for o, task in zip(tasks, loaded, strict=True)}

    def of_recipe(self, recipe: Recipe) -> dict[str, TaskScores]:
        """Scores of a merge, by task."""
        _check(recipe)
        self._candidates.put_recipe(recipe)
        return self._scores()

    def of_model(self, name: str) -> dict[str, TaskScores]:
        """Scores of one of the models itself."""
        self._candidates.put_model(name)
        return self._scores()

    def _scores(self) -> dict[str, TaskScores]:
        found = {}
        for name, items in self.tasks.items():
            scores = items.score(self._candidates.live.lm, range(items.num_items))
            found[name] = task_scores(items, [scores[place] for place in range(items.num_items)])
        self._say(", ".join(f"{each.task} {each.score:.4f}" for each in found.values()))
        return found


def _check(recipe: Recipe) -> None:
    if recipe.method.searches or recipe.result != "checkpoint":
        what = f"{recipe.method.method_name()} makes no checkpoint that could be scored in memory"
        raise RecipeError(what, recipe.name, "give a recipe of another method that makes a checkpoint")


def _fetched(recipe: Recipe, say: Callable[[str], None]) -> Mapping[str, ModelSource]:
    lookup = Lookup(recipe.folder)
    sources = open_models(recipe, lookup)
    if not lookup.missing:
        return sources
    lookup.fetch(say)
    return open_models(recipe, lookup)
