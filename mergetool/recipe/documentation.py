"""The documentation of recipes and methods, from the same classes that check them."""

from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter
from pydantic_core import PydanticUndefined

from mergetool.errors import RecipeError
from mergetool.methods import registry
from mergetool.methods.base import Method, Schedulable, TensorMethod, is_method
from mergetool.methods.then import After, steps
from mergetool.recipe.load import sections
from mergetool.recipe.render import suggestion
from mergetool.recipe.schema import Override


def method_facts(name: str | None = None) -> list[dict[str, Any]]:
    """All methods, or one, as JSON-able facts. Raises RecipeError for a name that is not known."""
    methods = registry()
    if name is not None and name not in methods:
        raise RecipeError(
            f"there is no method {name!r}", "methods", suggestion(name, methods) or "see: mergetool methods"
        )
    return [_facts(kind) for key, kind in methods.items() if name in (None, key)]


def summary(kind: type[Method]) -> str:
    """What a method is, in a line."""
    return kind.documentation().splitlines()[0].rstrip(".")


def _facts(kind: type[Method]) -> dict[str, Any]:
    text = kind.documentation()
    return {
        "name": kind.method_name(),
        "summary": summary(kind),
        "base": kind.needs_base,
        "min_models": kind.min_models,
        "max_models": kind.max_models,
        "documentation": text,
        "fields": list(_fields(kind)),
    }


def section_facts() -> dict[str, list[dict[str, Any]]]:
    """The fields of every section of a recipe that has some, and of an override; `models` has those of `base`."""
    kinds = {key: _model_of(annotation) for key, annotation in sections().items() if key != "models"}
    kinds["overrides"] = Override
    facts = {key: list(_fields(kind)) for key, kind in kinds.items() if kind is not None}
    every = [{**each, "name": f"{name}: {each['name']}"} for name, kind in steps().items() for each in _fields(kind)]
    return facts | {"then": [each for each in every if not each["name"].endswith(": match")]}


def step_facts() -> list[dict[str, Any]]:
    """Every step after merging, as JSON-able facts."""
    return [
        {"name": name, "documentation": kind.documentation(), "fields": list(_fields(kind))}
        for name, kind in steps().items()
    ]


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The class that a section, or each entry of one, is checked by; None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := _model_of(part)) is not None), None)


def _fields(kind: type[BaseModel], prefix: str = "") -> Iterator[dict[str, Any]]:
    """The fields of a method, those of its sections one by one."""
    schedulables = kind.schedulables() if is_method(kind) or issubclass(kind, After) else {}
    for key, info in kind.model_fields.items():
        annotation = info.annotation
        if key in ("method", "step"):
            continue
        section = _section_of(annotation)
        if section is not None:
            yield from _fields(section, f"{prefix}{key}.")
            continue
        plain = "a method" if annotation is TensorMethod else _plain_type(annotation)
        yield {
            "name": prefix + key,
            "type": _type(schedulables[key]) if key in schedulables else plain,
            "default": None if info.default is PydanticUndefined else info.default,
            "required": info.is_required(),
            "example": info.examples[0] if info.examples else None,
            "help": info.description,
        }


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The class of a field that is a mapping with fields of its own, perhaps left out."""
    kinds = [kind for kind in (get_args(annotation) or (annotation,)) if kind is not NoneType]
    if len(kinds) != 1 or not isinstance(kinds[0], type) or not issubclass(kinds[0], BaseModel):
        return None
    return None if issubclass(kinds[0], Method) else kinds[0]


def _type(number: Schedulable) -> str:
    if number.counted:
        return "number, gradient, or recover"
    return "number, gradient, or per model" if number.per_model else "number or gradient"


def _plain_type(annotation: Any) -> str:
    schema = TypeAdapter(annotation).json_schema()
    options = schema.get("anyOf", [schema])
    return " | ".join(word for option in options if (word := _word(option)) != "null")


def _word(option: Mapping[str, Any]) -> str:
    """What a value of this JSON schema is called in YAML."""
    if "enum" in option:
        return " | ".join(map(str, option["enum"]))
    word = str(option.get("const", option.get("type")))
    return {"array": "list", "object": "mapping"}.get(word, word)
