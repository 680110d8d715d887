"""The documentation of recipes and methods, from the same classes that check them."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic_core import PydanticUndefined

from mergetool.errors import RecipeError
from mergetool.methods import registry
from mergetool.methods.base import Method, TensorMethod, is_method
from mergetool.recipe.render import suggestion


def method_facts(name: str | None = None) -> list[dict[str, Any]]:
    """All methods, or one, as JSON-able facts. Raises RecipeError for a name that is not known."""
    methods = registry()
    if name is not None and name not in methods:
        raise RecipeError(
            f"there is no method {name!r}", "methods", suggestion(name, methods) or "see: mergetool methods"
        )
    return [_facts(kind) for key, kind in methods.items() if name in (None, key)]


def _facts(kind: type[Method]) -> dict[str, Any]:
    text = kind.documentation()
    return {
        "name": kind.method_name(),
        "summary": text.splitlines()[0].rstrip("."),
        "base": kind.needs_base,
        "min_models": kind.min_models,
        "max_models": kind.max_models,
        "documentation": text,
        "fields": list(_fields(kind)),
    }


def _fields(kind: type[BaseModel], prefix: str = "") -> Iterator[dict[str, Any]]:
    """The fields of a method, those of its sections one by one."""
    schedulables = kind.schedulables() if is_method(kind) else {}
    for key, info in kind.model_fields.items():
        annotation = info.annotation
        if key == "method":
            continue
        if isinstance(annotation, type) and issubclass(annotation, BaseModel) and not is_method(annotation):
            yield from _fields(annotation, f"{prefix}{key}.")
            continue
        plain = "a method" if annotation is TensorMethod else _plain_type(annotation)
        yield {
            "name": prefix + key,
            "type": _type(schedulables[key].per_model) if key in schedulables else plain,
            "default": None if info.default is PydanticUndefined else info.default,
            "required": info.is_required(),
            "example": info.examples[0] if info.examples else None,
            "help": info.description,
        }


def _type(per_model: bool) -> str:
    return "number, gradient, or per model" if per_model else "number or gradient"


def _plain_type(annotation: Any) -> str:
    schema = TypeAdapter(annotation).json_schema()
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    options = schema.get("anyOf", [schema])
    return " | ".join(
        " | ".join(map(str, o["enum"])) if "enum" in o else str(o.get("const", o.get("type"))) for o in options
    )
