"""The sections `merge` and `then` of a recipe: which method and which steps after it, their settings, and overrides."""

from functools import cache
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError, create_model

from mergetool.errors import RecipeError
from mergetool.methods import method_named, registry
from mergetool.methods.base import Method
from mergetool.methods.then import After
from mergetool.methods.then import steps as known_steps
from mergetool.recipe.document import Document
from mergetool.recipe.render import render, suggestion
from mergetool.recipe.schema import Override
from mergetool.recipe.then import step_class


def merge_section(
    document: Document, problems: list[RecipeError]
) -> tuple[type[Method] | None, Method | None, tuple[Override, ...]]:
    """The class of the method, the method, and the overrides; what is wrong with them is added to `problems`."""
    data = document.data["merge"]
    if not isinstance(data, dict):
        problems.append(document.error(("merge",), "expected a mapping with `method`", "write merge: {method: linear}"))
        return None, None, ()
    kind = _method_class(document, data, problems)
    if kind is None:
        return None, None, ()
    method = None
    overrides: tuple[Override, ...] = ()
    try:
        method = kind.model_validate({key: value for key, value in data.items() if key != "overrides"})
    except ValidationError as error:
        problems += render(document, ("merge",), error, kind)
    if "overrides" in data:
        try:
            overrides = _overrides(kind).validate_python(data["overrides"])
        except ValidationError as error:
            problems += render(document, ("merge", "overrides"), error, override_class(kind))
    return kind, method, overrides


def _method_class(document: Document, data: dict[str, Any], problems: list[RecipeError]) -> type[Method] | None:
    name = data.get("method")
    if isinstance(name, str) and (kind := method_named(name)) is not None:
        return kind
    if name is None:
        problems.append(document.error(("merge",), "required key 'method' is missing", "see: mergetool methods"))
    else:
        fix = suggestion(str(name), registry()) or "see: mergetool methods"
        problems.append(document.error(("merge", "method"), f"there is no method {str(name)!r}", fix))
    return None


@cache
def _overrides(method: type[Method]) -> TypeAdapter[tuple[Override, ...]]:
    return TypeAdapter(tuple[override_class(method), ...])  # type: ignore[arg-type, misc]


@cache
def override_class(method: type[Method]) -> type[Override]:
    """The override model of a method: a glob, `use`, and its own fields (those of a fit or a bundle do not vary)."""
    fields: dict[str, Any] = {
        key: (info.rebuild_annotation(), Field(None, description=info.description))
        for key, info in method.model_fields.items()
        if key != "method" and method.varies
    }
    return create_model(f"{method.__name__}Override", __base__=Override, **fields)


def then_section(document: Document, problems: list[RecipeError]) -> tuple[After, ...]:
    """The steps after merging; what is wrong with them is added to `problems`."""
    data = document.data.get("then", ())
    if "then" in document.data and (not isinstance(data, list) or not data):
        problems.append(document.error(("then",), "expected a list of steps", "write then: [{step: match-norm}]"))
        return ()
    found = (_after(document, index, each, problems) for index, each in enumerate(data))
    return tuple(step for step in found if step is not None)


def _after(document: Document, index: int, data: Any, problems: list[RecipeError]) -> After | None:
    kind = step_class(data)
    if kind is None:
        name = data.get("step") if isinstance(data, dict) else data
        what = "required key 'step' is missing" if name is None else f"there is no step {str(name)!r}"
        place = ("then", index, "step") if isinstance(data, dict) and "step" in data else ("then", index)
        fix = suggestion(str(name), known_steps()) or f"one of: {', '.join(known_steps())}"
        problems.append(document.error(place, what, f"{fix} (as in then: [{{step: match-norm}}])"))
        return None
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problems += render(document, ("then", index), error, kind)
        return None
