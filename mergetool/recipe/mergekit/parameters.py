"""One parameter of a mergekit recipe, read through its scopes: what it is worth, filter by filter.

A setting is a number, a list of numbers (a gradient along depth), or a list of `{filter, value}` lines, and may stand
at the model, the slice and the whole recipe. The nearest scope wins; where none of its filters matches, the next one
speaks; then mergekit's default.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergetool.errors import RecipeError
from mergetool.recipe.document import Document, Place
from mergetool.recipe.mergekit.filters import Branch
from mergetool.recipe.render import unknown_key

REQUIRED: Any = object()


@dataclass(frozen=True)
class MergekitParameter:
    """A parameter of a mergekit method: our field, mergekit's default, and whether each model has its own."""

    field: str
    default: Any = REQUIRED
    per_model: bool = False
    words: Mapping[Any, Any] | None = None
    """Our words for mergekit's values, where they differ."""

    def translated(self, value: Any) -> Any:
        return value if self.words is None or isinstance(value, dict) else self.words.get(value, value)


@dataclass(frozen=True)
class Scope:
    """One `parameters:` mapping and its place."""

    parameters: Mapping[str, Any]
    place: Place


def branches_of(document: Document, key: str, parameter: MergekitParameter, scopes: Sequence[Scope]) -> list[Branch]:
    """The lines of a parameter, nearest scope first, down to the first that holds for every name.

    Raises RecipeError where a setting cannot be read, or is missing though mergekit requires it.
    """
    found: list[Branch] = []
    for scope in scopes:
        if key in scope.parameters:
            lines = _lines(document, scope.parameters[key], (*scope.place, key))
            found += [replace(line, value=parameter.translated(line.value)) for line in lines]
            if found[-1].text is None:
                return found
    if parameter.default is REQUIRED:
        what = f"{key} is required for the names that no filter matches" if found else f"{key} is required"
        raise document.error(scopes[0].place, what, f"add {key}: VALUE")
    return [*found, Branch(None, parameter.translated(parameter.default), ())]


def _lines(document: Document, setting: Any, place: Place) -> list[Branch]:
    """A setting's lines up to the first one without a filter."""
    listed = isinstance(setting, list) and any(isinstance(item, dict) for item in setting)
    found: list[Branch] = []
    for index, line in enumerate(setting if listed else [setting]):
        here = (*place, index) if listed else place
        if not isinstance(line, dict):
            return [*found, Branch(None, _value(document, line, here), here)]
        if problems := check_keys(document, here, line, ("filter", "value")):
            raise RecipeError.of(problems)
        text = line.get("filter")
        value = _value(document, line.get("value"), (*here, "value"))
        if text is None or text == "*":
            return [*found, Branch(None, value, here)]
        found.append(Branch(str(text), value, here))
    return found


def _value(document: Document, value: Any, place: Place) -> Any:
    """One value, or a gradient."""
    if not isinstance(value, list):
        return value
    if not value or not all(type(item) in (int, float) for item in value):
        raise document.error(place, f"expected numbers from the first layer to the last, found {value}", "write [a, b]")
    return value[0] if len(value) == 1 else {"gradient": value}


def check_keys(document: Document, place: Place, data: Any, known: Sequence[str]) -> list[RecipeError]:
    """An error for every unknown key. Raises RecipeError when `data` is not a mapping."""
    if not isinstance(data, dict):
        raise document.error(place, f"expected a mapping, found {data!r}", f"its keys are: {', '.join(known)}")
    return [unknown_key(document, (*place, key), known) for key in data if key not in known]
