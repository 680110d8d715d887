"""A user who does what an error advises, until the run goes through or there is no advice left."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import mergetool
from mergetool.errors import MergetoolError
from mergetool.outputs.result import Result

_MOST_STEPS = 6


class NoAdviceError(Exception):
    """An error whose fix holds nothing that can be put into the recipe."""


def outcomes(recipe: dict[str, Any], folder: Path, *, refusal: str = "") -> list[Result]:
    """Run the recipe; where it is refused, run every recipe that the fix proposes. All results, one at least.

    None, where a refusal without such a fix is as good: one that says the word `refusal`.
    """
    try:
        return list(_outcomes(recipe, folder, _MOST_STEPS))
    except NoAdviceError as error:
        if refusal and refusal in without_paths(str(error)):
            return []
        raise


def assert_said(word: str, recipe: dict[str, Any], folder: Path) -> None:
    """The run is refused, or it warns, with this word in what it says."""
    try:
        said = " ".join(mergetool.run(recipe, output=folder).warnings)
    except MergetoolError as error:
        said = str(error)
    assert word in without_paths(said), f"nothing about {word}: {said!r}"


def without_paths(text: str) -> str:
    """A message without the folders that it names: their names hold words of the tests."""
    return re.sub(r"/[^\s:,')]+", "", text)


def _outcomes(recipe: dict[str, Any], folder: Path, steps: int) -> Iterator[Result]:
    try:
        yield mergetool.run(recipe, output=folder)
        return
    except MergetoolError as error:
        proposed = list(proposals(recipe, error.fix))
        if not proposed or steps == 0:
            raise NoAdviceError(str(error)) from error
    for index, other in enumerate(proposed):
        yield from _outcomes(other, folder.with_name(f"{folder.name}-{index}"), steps - 1)


def proposals(recipe: dict[str, Any], fix: str) -> Iterator[dict[str, Any]]:
    """Recipes that the text of a fix describes: settings of `check`, and overrides."""
    for key, first, second in re.findall(r"check\.(\w+): (\w+)(?: or (\w+))?", fix):
        for value in filter(None, (first, second)):
            yield _with(recipe, "check", {key: value})
    for text in re.findall(r"overrides: (\[\{.*?\}\])", fix):
        known = recipe["merge"].get("overrides", [])
        yield _with(recipe, "merge", {"overrides": [*known, *yaml.safe_load(text)]})


def _with(recipe: dict[str, Any], section: str, values: dict[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(recipe)
    changed[section] = {**changed.get(section, {}), **values}
    return changed
