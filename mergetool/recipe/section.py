"""The `merge` section of a recipe: which method it asks for, its settings, and the overrides of some tensors."""

from functools import cache
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError, create_model

from mergetool.errors import RecipeError
from mergetool.methods import registry
from mergetool.methods.base import Method
from mergetool.recipe.document import Document
from mergetool.recipe.render import render, suggestion
from mergetool.recipe.schema import Override


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
    methods = registry()
    name = data.get("method")
    if isinstance(name, str) and name in methods:
        return methods[name]
    if name is None:
        problems.append(document.error(("merge",), "required key 'method' is missing", "see: mergetool methods"))
    else:
        fix = suggestion(str(name), methods) or "see: mergetool methods"
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
