"""`sweep`: several results of one recipe in one run, told apart by numbers of its method, or of the steps after it.

    sweep: {scale: [0.5, 1.0, 1.5]}                    three results, PATH/scale-0.5 and so on
    sweep: {scale: [0.5, 1.0], density: [0.2, 0.4]}    a grid of four
    sweep: {weight: {simplex: 4}}                      all weights of the models that are quarters and add up to 1
    sweep: {lines.last: [1.0, 1.5]}                    a number of the step `lines` after merging

Each result is that of a plain recipe, with these numbers in `merge` and `then`: so it is checked, and so its lock has
it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import comb, prod
from typing import Any

from mergetool.errors import RecipeError
from mergetool.methods import method_named
from mergetool.methods.base import Method
from mergetool.methods.then import After, steps, titles
from mergetool.recipe.document import Document, Place
from mergetool.recipe.render import suggestion
from mergetool.recipe.then import step_class

MOST = 64
"""Results of one sweep."""
_LONGEST = 80
"""Letters of a result's name, beyond which its place is its name."""


@dataclass
class PointDocument(Document):
    """The recipe of one result; messages point to where its numbers stand in `sweep`."""

    written: Document = field(default_factory=lambda: Document("", None))
    places: Mapping[Place, Place] = field(default_factory=dict)
    """Where each number stands, by its place in a plain recipe."""

    def where(self, place: Place) -> str:
        for number, own in self.places.items():
            if place[: len(number)] == number:
                return self.written.where((*own, *place[len(number) :]) if len(own) > 2 else own)
        return self.written.where(place)


@dataclass(frozen=True)
class _Axis:
    """A number, and the values that it shall have with the places where they are written."""

    number: Place
    values: Sequence[tuple[Place, Any]] = ()


def sweep_documents(document: Document, problems: list[RecipeError]) -> dict[str, PointDocument]:
    """The recipes of all results, by name; what is wrong with the sweep itself is added to `problems`."""
    axes = _axes(document, problems)
    if problems or not axes:
        return {}
    count = prod(len(axis.values) for axis in axes.values())
    if count > MOST:
        problems.append(_too_many(document, ("sweep",), count))
        return {}
    points = list(product(*([(axis.number, *value) for value in axis.values] for axis in axes.values())))
    names = _names([dict(zip(axes, (value for *_, value in point), strict=True)) for point in points])
    return {name: _document(document, point) for name, point in zip(names, points, strict=True)}


def _too_many(document: Document, place: Place, count: int) -> RecipeError:
    what = f"{count} results, and one run makes at most {MOST}"
    return document.error(place, what, "sweep over fewer values, in several runs")


def _document(document: Document, point: Sequence[tuple[Place, Place, Any]]) -> PointDocument:
    data = {key: each for key, each in document.data.items() if key != "sweep"}
    for number, _, value in point:
        data = _with(data, number, value)
    places = {number: place for number, place, _ in point}
    return PointDocument(document.name, data, folder=document.folder, written=document, places=places)


def _with(data: Any, place: Place, value: Any) -> Any:
    """A copy of data with a value at a place."""
    if not place:
        return value
    copy: Any = list(data) if isinstance(data, list) else dict(data)
    copy[place[0]] = _with(copy[place[0]] if len(place) > 1 else None, place[1:], value)
    return copy


def _axes(document: Document, problems: list[RecipeError]) -> dict[str, _Axis]:
    """The numbers with their values, as they are called in `sweep`."""
    sweep, merge = document.data["sweep"], document.data.get("merge")
    kind = method_named(str(merge.get("method"))) if isinstance(merge, dict) else None
    if not isinstance(sweep, dict) or not sweep:
        what = "expected numbers of the method with their values"
        problems.append(document.error(("sweep",), what, "write sweep: {scale: [0.5, 1.0]}"))
        return {}
    if kind is None:
        return {}  # which will be said
    problems += _refusals(document, kind)
    return {key: _axis(document, kind, key, sweep[key], problems) for key in sweep}


def _axis(document: Document, kind: type[Method], key: str, values: Any, problems: list[RecipeError]) -> _Axis:
    title, dot, number = str(key).rpartition(".")
    if not dot:
        return _Axis(("merge", key), _values(document, kind, ("merge", key), ("sweep", key), values, problems))
    then = document.data.get("then")
    written = {name: index for index, name in enumerate(titles(map(_name, then)))} if isinstance(then, list) else {}
    step = step_class(then[written[title]]) if title in written else None
    if step is None:
        near = suggestion(title, [*written, *steps()]) or f"name one of: {', '.join(written) or 'there are none'}"
        fix = f"add then: [{{step: {title}}}]" if title in steps() else near
        problems.append(document.error(("sweep", key), f"`then` has no step {title!r}", fix))
        return _Axis(())
    place: Place = ("then", written[title], number)
    return _Axis(place, _values(document, step, place, ("sweep", key), values, problems))


def _name(step: Any) -> str:
    return str(step.get("step")) if isinstance(step, dict) else ""


def _values(
    document: Document,
    kind: type[Method] | type[After],
    number: Place,
    place: Place,
    values: Any,
    problems: list[RecipeError],
) -> list[tuple[Place, Any]]:
    """The values of a number of a method or a step, and where they stand in `sweep`."""
    key = str(number[-1])
    schedulable = kind.schedulables().get(key)
    if key not in kind.model_fields or key in ("method", "step"):
        numbers = list(kind.schedulables()) or [each for each in kind.model_fields if each not in ("step", "match")]
        fix = suggestion(key, numbers) or f"its numbers are: {', '.join(numbers)}"
        name = kind.step_name() if issubclass(kind, After) else kind.method_name()
        problems.append(document.error(place, f"{name} has no number {key!r}", fix))
        return []
    if key in _at(document.data, number[:-1]):
        what = f"`{place[-1]}` is swept, so that in `{number[0]}` it would have no effect"
        problems.append(document.error(number, what, f"remove `{key}` here, or in `sweep`"))
    if isinstance(values, dict) and set(values) == {"simplex"} and schedulable is not None and schedulable.per_model:
        return [(place, each) for each in _simplex(document, place, values["simplex"], problems)]
    if not isinstance(values, list) or not values:
        problems.append(document.error(place, "expected a list of values", f"write {key}: [0.5, 1.0]"))
        return []
    if schedulable is None and not all(type(value) in (int, float) for value in values):
        problems.append(document.error(place, f"`{key}` is no number that a sweep could vary", "run it several times"))
    for index, value in enumerate(values):
        if value in values[:index]:
            fix = "remove it: two results would be the same"
            problems.append(document.error((*place, index), f"the value {value!r} is there already", fix))
    return [((*place, index), value) for index, value in enumerate(values)]


def _at(data: Any, place: Place) -> Any:
    for key in place:
        data = data[key]
    return data


def _simplex(document: Document, place: Place, steps: Any, problems: list[RecipeError]) -> Iterator[dict[str, float]]:
    """Weights of all models that are multiples of 1 / steps and add up to 1."""
    models = list(document.data.get("models") or ())
    if type(steps) is not int or not 1 <= steps <= MOST or not models:
        what = f"expected a whole number of steps, found {steps!r}"
        problems.append(document.error(place, what, "write {simplex: 4} for quarters"))
        return
    if (count := comb(steps + len(models) - 1, steps)) > MOST:
        problems.append(_too_many(document, place, count))
        return
    for counts in _sums(steps, len(models)):
        yield {name: count / steps for name, count in zip(models, counts, strict=True)}


def _sums(total: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to add up to a number with so many others."""
    if count == 1:
        yield (total,)
        return
    for first in range(total, -1, -1):
        for rest in _sums(total - first, count - 1):
            yield (first, *rest)


def _refusals(document: Document, kind: type[Method]) -> Iterator[RecipeError]:
    """What cannot be made several times at once."""
    data, name = document.data, kind.method_name()
    if why := _alone(kind):
        key, values = next(iter(data["sweep"].items()))
        value = values[0] if isinstance(values, list) and values else "VALUE"
        fix = f"remove `sweep`, and make one result a run: --set merge.{key}={value} -o PATH/{_told(value, 4)}"
        yield document.error(("sweep",), f"{name} {why}", fix)
    output = data.get("output")
    if isinstance(output, dict) and "hub" in output:
        what = "a repository holds one model, and a sweep makes several"
        yield document.error(("output", "hub"), what, "remove `hub`; then: mergetool push PATH/RESULT ORG/NAME")
    if "evaluate" in data:
        what = "results of a sweep are scored one by one"
        yield document.error(("evaluate",), what, "remove `evaluate`; then: mergetool evaluate PATH/RESULT --tasks ...")


def _alone(kind: type[Method]) -> str:
    """Why a run of a method makes one result, if so: nothing of it could be shared."""
    if kind.searches:
        return "tries many candidates and leaves the best"
    if kind.result != "checkpoint":
        return "takes whole models apart for every result (give --cache FOLDER, so that runs share the factors)"
    if kind.arranges or kind.uses_architecture:
        return "looks at whole models for every result"
    return ""


def _names(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """A folder's name for each result: its numbers, with more digits where needed, or its place among all."""
    for digits in (4, 17):
        told = ["_".join(f"{key}-{_told(value, digits)}" for key, value in point.items()) for point in points]
        if len(set(told)) == len(told) and max(map(len, told)) <= _LONGEST:
            return told
    keys, count = "_".join(points[0])[:_LONGEST], len(points)
    return [f"{keys}-{index:0{len(str(count))}}-of-{count}" for index in range(1, count + 1)]


def _told(value: Any, digits: int) -> str:
    if isinstance(value, dict):
        told = "-".join(f"{key}-{_told(each, digits)}" for key, each in value.items() if each != 0)
    elif isinstance(value, list):
        told = "-".join(_told(each, digits) for each in value)
    else:
        told = min(f"{value:.{digits}g}", repr(value), key=len) if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]", "-", told)
