"""The JSON schema of recipes, for editors and other tools, from the same classes that check them."""

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from mergetool.methods import registry
from mergetool.methods.base import Method, TensorMethod
from mergetool.methods.families.genes import Inner, Range
from mergetool.methods.then import After, steps
from mergetool.recipe.checkpoints import SCHEMA as CHECKPOINTS
from mergetool.recipe.load import sections
from mergetool.recipe.section import override_class

_METHOD, _SEARCHED, _SETTING = "TensorMethod", "SearchedMethod", "SearchedSetting"


SWEEP = {
    "type": "object",
    "minProperties": 1,
    "additionalProperties": {
        "anyOf": [
            {"type": "array", "minItems": 1},
            {
                "type": "object",
                "properties": {"simplex": {"type": "integer", "minimum": 1}},
                "required": ["simplex"],
                "additionalProperties": False,
            },
        ]
    },
    "description": "numbers of the method, and the values of each: one result for each combination",
}
"""The section that makes several results."""


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe file: sections, and for `merge` one alternative per method, chosen by `method`."""
    definitions: dict[str, Any] = {}
    properties = {key: _schema(kind, definitions) for key, kind in sections().items()}
    properties["merge"] = {"oneOf": [_merge_schema(kind, definitions) for kind in registry().values()]}
    properties["then"] = {
        "type": "array",
        "minItems": 1,
        "items": {"oneOf": [_step_schema(kind, definitions) for kind in steps().values()]},
        "description": "steps on what merging changed, in order",
    }
    properties["sweep"] = SWEEP
    properties["models"] = {"anyOf": [properties["models"], CHECKPOINTS]}
    methods = [kind for kind in registry().values() if kind.merges]
    definitions[_METHOD] = {"oneOf": [_method_schema(kind, definitions) for kind in methods]}
    definitions[_SEARCHED] = {"oneOf": [_searched(_merge_schema(kind, definitions)) for kind in methods]}
    definitions[_SETTING] = _searched_setting(definitions)
    for option in definitions["ModelReference"]["properties"]["recipe"]["anyOf"]:
        if option.get("type") == "object":  # a recipe written in place is checked like any other
            option.clear()
            option["$ref"] = "#"
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
    """A method with its overrides."""
    schema = _method_schema(kind, definitions)
    if not kind.searches:
        override = _schema(override_class(kind), definitions)
        schema["properties"]["overrides"] = {"type": "array", "items": override, "description": "first match wins"}
    return schema


def _step_schema(kind: type[After], definitions: dict[str, Any]) -> dict[str, Any]:
    schema = _schema(kind, definitions)
    return {
        **schema,
        "required": ["step", *schema.get("required", ())],
        "description": " ".join(kind.documentation().split("\n\n")[0].split()),
    }


def _method_schema(kind: type[Method], definitions: dict[str, Any]) -> dict[str, Any]:
    """A method's own fields. Those that hold another method refer to all that may stand there."""
    schema = _schema(kind, definitions)
    schema["required"] = ["method", *schema.get("required", ())]
    schema["description"] = "\n\n".join(" ".join(part.split()) for part in kind.documentation().split("\n\n")[:2])
    for key, info in kind.model_fields.items():
        if (held := {TensorMethod: _METHOD, Inner: _SEARCHED}.get(info.annotation)) is not None:  # type: ignore[arg-type]
            schema["properties"][key] = {"$ref": f"#/$defs/{held}", "description": info.description}
    return schema


def _searched(schema: dict[str, Any]) -> dict[str, Any]:
    """The same method where any setting may be a range."""
    settings = dict(schema["properties"])
    for key, setting in settings.items():
        if key == "overrides":
            settings[key] = {**setting, "items": _searched(setting["items"])}
        elif key not in ("method", "match", "use"):
            told = {"description": setting["description"]} if "description" in setting else {}
            settings[key] = {"anyOf": [setting, {"$ref": f"#/$defs/{_SETTING}"}], **told}
    return {**schema, "properties": settings}


def _searched_setting(definitions: dict[str, Any]) -> dict[str, Any]:
    """A range, or a gradient or one value per model with ranges in it."""
    one = {"anyOf": [{"type": "number"}, _named(Range, definitions)]}
    gradient = {
        "type": "object",
        "properties": {"gradient": {"type": "array", "items": one, "minItems": 2}},
        "required": ["gradient"],
        "additionalProperties": False,
    }
    models = {"type": "object", "additionalProperties": {"anyOf": [*one["anyOf"], gradient]}, "minProperties": 1}
    return {"anyOf": [_named(Range, definitions), gradient, models]}


def _named(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """A class among the definitions, and a reference to it."""
    definitions[kind.__name__] = _schema(kind, definitions)
    return {"$ref": f"#/$defs/{kind.__name__}"}


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
