"""A recipe to begin with: everything that a method can be told, with its default and what it means, as comments."""

from collections.abc import Iterator
from textwrap import wrap
from typing import Any

import yaml

from mergetool.methods import registry
from mergetool.recipe.documentation import method_facts

_NAMES = ("first", "second", "third")
_COLUMN, _WIDTH = 34, 116


def starter(name: str) -> str:
    """The text of a recipe for one method. Raises RecipeError for a name that is not known."""
    (facts,) = method_facts(name)
    return "\n".join([*_head(facts), *_models(facts), *_merge(facts), *_output(name)]) + "\n"


def _head(facts: dict[str, Any]) -> Iterator[str]:
    yield f"# {facts['summary']}."
    yield f"# All about it: mergetool methods {facts['name']}"
    yield "# Put your models in; a line behind a # tells a default: to change it, remove the # and write what you want."


def _models(facts: dict[str, Any]) -> Iterator[str]:
    kind = registry()[facts["name"]]
    alone = bool(kind.needs_adapters)
    if facts["base"] != "unused" and not alone:
        yield _line(
            "base: ./models/base", "the common ancestor of the models: a folder, a .safetensors file or org/name"
        )
    yield "models:"
    for name in _NAMES[: max(kind.min_models, min(2, kind.max_models or 2))]:
        place = f"{{adapter: ./adapters/{name}}}" if alone else f"./models/{name}"
        yield _line(f"  {name}: {place}", "a name of your choice, and where that model is")
    if kind.on_base:
        yield "calibration:"
        yield _line("  base: {data: ./new.jsonl}", 'rows of the new task, one JSON object a line: {"text": "an input"}')
        for name in _NAMES[:2]:
            yield _line(f"  {name}: {{data: ./{name}.jsonl}}", "rows that this model was trained on")
    elif kind.statistic:
        yield "calibration:"
        yield _line("  data: ./rows.jsonl", 'rows for all models, one JSON object a line: {"text": "an input"}')
        yield _line("  # samples: 256", "rows that are used, from the first on")


def _merge(facts: dict[str, Any]) -> Iterator[str]:
    yield "merge:"
    yield f"  method: {facts['name']}"
    section = ""
    for field in facts["fields"]:
        *outer, key = field["name"].split(".")
        if outer and outer[0] != section:
            yield f"  # {outer[0]}:"
        section = outer[0] if outer else ""
        yield _field(field, key, nested=bool(outer))
    if not registry()[facts["name"]].searches:
        yield _line(
            f'  # overrides: [{{match: "*.bias", use: {_NAMES[0]}}}]', "other settings for some tensors, or a copy"
        )


def _field(field: dict[str, Any], key: str, *, nested: bool) -> str:
    """A field that must be written down, with an example; or as a comment, with its default."""
    if field["required"]:
        return _line(f"  {key}: {_flow(field['example'])}", field["help"])
    value = "" if field["default"] is None else f" {_flow(field['default'])}"
    return _line(f"  # {'  ' * nested}{key}:{value}", f"{field['help']} ({field['type']})")


def _output(name: str) -> Iterator[str]:
    yield "# compute: {dtype: float32, seed: 0}"
    yield "output:"
    yield f"  path: ./{name}"
    yield _line("  # dtype: source", "storage dtype: source, float32, bfloat16 or float16")


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("\n...\n").strip()


def _line(text: str, meaning: str) -> str:
    """A line and what it means beside it; what does not fit there goes on below."""
    first, *more = wrap(meaning, _WIDTH - max(_COLUMN, len(text)), break_on_hyphens=False)
    return "\n".join([f"{text.ljust(_COLUMN)}  # {first}", *(f"{'  #'.ljust(_COLUMN)}  # {part}" for part in more)])
