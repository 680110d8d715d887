"""One parameter of a mergekit recipe, read through its scopes: what it is worth, filter by filter.

A setting is a number, a list of numbers (a gradient along depth), or a list of `{filter, value}` lines, and may stand
at the model, the slice, the module and the whole recipe. The nearest scope wins; where none of its filters matches, the
next one speaks; then mergekit's default.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergetool.recipe.document import Place
from mergetool.recipe.mergekit.filters import Branch
from mergetool.recipe.mergekit.findings import Findings
from mergetool.recipe.mergekit.scalars import scalar

REQUIRED: Any = object()


@dataclass(frozen=True)
class MergekitParameter:
    """A parameter of a mergekit method: our field, mergekit's default, and whether each model has its own."""

    field: str
    default: Any = REQUIRED
    per_model: bool = False
    words: Mapping[Any, Any] | None = None
    """Our words for mergekit's values, where they differ."""

    @property
    def kind(self) -> type:
        """What mergekit takes its values as."""
        return type(self.default) if type(self.default) in (bool, int) else float

    def translated(self, value: Any) -> Any:
        return value if self.words is None or isinstance(value, dict) else self.words.get(value, value)


@dataclass(frozen=True)
class Scope:
    """One `parameters:` mapping and its place."""

    parameters: Mapping[str, Any]
    place: Place


def branches_of(findings: Findings, key: str, parameter: MergekitParameter, scopes: Sequence[Scope]) -> list[Branch]:
    """The lines of a parameter, nearest scope first, down to the first that holds for every name.

    Raises RecipeError where a setting cannot be read, or is missing though mergekit requires it.
    """
    branches: list[Branch] = []
    for scope in scopes:
        if scope.parameters.get(key, []) != []:
            lines = _lines(findings, scope.parameters[key], parameter.kind, (*scope.place, key))
            branches += [replace(line, value=parameter.translated(line.value)) for line in lines]
            if branches[-1].text is None:
                return branches
    if parameter.default is REQUIRED:
        what = f"{key} is required for the names that no filter matches" if branches else f"{key} is required"
        raise findings.stop(scopes[0].place, what, _where_to_write(findings, key, scopes))
    return [*branches, Branch(None, parameter.translated(parameter.default), ())]


def _where_to_write(findings: Findings, key: str, scopes: Sequence[Scope]) -> str:
    """How to add a parameter; perhaps it stands one level too high already."""
    for scope in scopes:
        holder = findings.at(scope.place[:-1])
        if isinstance(holder, dict) and key in holder:
            return f"write it inside `parameters`: parameters: {{{key}: {holder[key]}}}"
    return f"add {key}: VALUE"


def _lines(findings: Findings, setting: Any, kind: type, place: Place) -> list[Branch]:
    """A setting's lines up to the first one without a filter."""
    listed = isinstance(setting, list) and any(isinstance(item, dict) for item in setting)
    branches: list[Branch] = []
    for index, line in enumerate(setting if listed else [setting]):
        here = (*place, index) if listed else place
        if not isinstance(line, dict):
            return [*branches, Branch(None, _value(findings, line, kind, here), here)]
        findings.stray(line, here, ("filter", "value"), {})
        if "value" not in line:
            raise findings.stop(here, "a line of filters needs a value", "write {filter: TEXT, value: NUMBER}")
        text = line.get("filter")
        value = _value(findings, line["value"], kind, (*here, "value"))
        if text is None or text == "*":
            return [*branches, Branch(None, value, here)]
        branches.append(Branch(str(text), value, here))
    return branches


def _value(findings: Findings, value: Any, kind: type, place: Place) -> Any:
    """One value, or a gradient."""
    if not isinstance(value, list):
        return _scalar(findings, value, kind, place)
    values = [_scalar(findings, item, kind, (*place, index)) for index, item in enumerate(value)]
    if len(set(values)) == 1:
        return values[0]
    if not values or kind is bool:
        what = f"expected numbers from the first layer to the last, found {value}"
        raise findings.stop(place, what, "write true or false" if values else "write [a, b]")
    return {"gradient": values}


def _scalar(findings: Findings, value: Any, kind: type, place: Place) -> Any:
    try:
        return scalar(value, kind)
    except ValueError as error:
        fix = "write true or false" if kind is bool else "write a number, or numbers [a, b] along depth"
        raise findings.stop(place, str(error), fix) from None
