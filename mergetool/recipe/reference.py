"""The documentation of recipes and methods, from the same classes that check them."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic_core import PydanticUndefined

from mergetool.errors import RecipeError
from mergetool.methods import registry
from mergetool.methods.base import Method, TensorMethod
from mergetool.recipe.load import SECTIONS, override_class
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
    schedulables = kind.schedulables() if issubclass(kind, Method) else {}
    for key, info in kind.model_fields.items():
        annotation = info.annotation
        if key == "method":
            continue
        if isinstance(annotation, type) and issubclass(annotation, BaseModel) and not issubclass(annotation, Method):
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


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe file: sections, and for `merge` one alternative per method, chosen by `method`."""
    definitions: dict[str, Any] = {}
    properties = {key: _schema(kind, definitions) for key, kind in SECTIONS.items()}
    properties["merge"] = {"oneOf": [_merge_schema(kind, definitions) for kind in registry().values()]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mergetool recipe",
        "type": "object",
        "additionalProperties": False,
        "required": ["models", "merge"],
        "properties": properties,
        "$defs": dict(sorted(definitions.items())),
    }


def _merge_schema(kind: type[Method], definitions: dict[str, Any]) -> dict[str, Any]:
    schema = _schema(kind, definitions)
    schema["required"] = ["method"]
    schema["description"] = kind.documentation().splitlines()[0]
    override = _schema(override_class(kind), definitions)
    schema["properties"]["overrides"] = {"type": "array", "items": override, "description": "first match wins"}
    return schema


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    schema = TypeAdapter(kind).json_schema(ref_template="#/$defs/{model}")
    for name, definition in schema.pop("$defs", {}).items():
        definitions[_short(name)] = _renamed(definition)
    renamed: dict[str, Any] = _renamed(schema)
    return renamed


def _renamed(node: Any) -> Any:
    """pydantic names a generic's definition after all its constraints; give references their short names."""
    if isinstance(node, Mapping):
        return {
            key: f"#/$defs/{_short(str(value).rpartition('/')[2])}" if key == "$ref" else _renamed(value)
            for key, value in node.items()
        }
    return [_renamed(item) for item in node] if isinstance(node, list) else node


def _short(name: str) -> str:
    if not name.startswith("Gradient_"):
        return name
    import hashlib

    return f"Gradient{hashlib.sha256(name.encode()).hexdigest()[:6]}"
