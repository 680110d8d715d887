"""Models that are adapters: `models: {math: {adapter: ./lora}}`.

Where all models are adapters and the result is one, they are merged by themselves, without the weights of a base. Else
such a model is the base with the adapter on top, as `{source: BASE, adapters: [./lora]}` says in full. A method that
uses no base may have one for their sake; nothing else can then refer to it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter

from mergetool.errors import RecipeError
from mergetool.methods import method_named
from mergetool.recipe.document import Document, Place
from mergetool.recipe.schema import Recipe, Reference
from mergetool.recipe.then import base_for_steps

_OTHERS = ("source", "adapters", "select", "recipe", "folder")


def is_adapter(reference: Any) -> bool:
    """Whether a model, as it is written, is an adapter alone."""
    return isinstance(reference, dict) and reference.get("adapter") is not None


def has_adapters(data: Mapping[str, Any]) -> bool:
    """Whether any model of a recipe's data is one."""
    models = data.get("models")
    return isinstance(models, dict) and any(map(is_adapter, models.values()))


def makes_adapter(data: Mapping[str, Any]) -> bool:
    """Whether a recipe's data ask for an adapter: in so many words, or by adapters as models and no base."""
    output = data.get("output")
    kind = output.get("kind") if isinstance(output, dict) else None
    return kind == "adapter" or (kind is None and "base" not in data and _all_adapters(data))


def is_alone(data: Mapping[str, Any]) -> bool:
    """Whether a recipe's data are adapters, to be merged by themselves."""
    return makes_adapter(data) and _all_adapters(data)


def _all_adapters(data: Mapping[str, Any]) -> bool:
    models = data.get("models")
    return isinstance(models, dict) and bool(models) and all(map(is_adapter, models.values()))


def names_base(data: Mapping[str, Any]) -> bool:
    """Whether a recipe's data has a base that it can refer to."""
    merge = data.get("merge")
    kind = method_named(str(merge.get("method"))) if isinstance(merge, dict) else None
    unused = kind is not None and kind.needs_base == "unused" and not base_for_steps(data, kind)
    only_below = unused and has_adapters(data) and not makes_adapter(data)
    return "base" in data and not only_below


def over(base: Any, model: Any) -> Any:
    """A model as it is written, in full: an adapter on top of the base. Others are as they are."""
    if not is_adapter(model):
        return model
    below = {"source": base} if isinstance(base, str) else {key: base[key] for key in base if key != "head"}
    rest = {key: value for key, value in model.items() if key != "adapter"}
    return {**below, "adapters": [*below.get("adapters", ()), model["adapter"]], **rest}


def adapter_problems(document: Document) -> Iterator[RecipeError]:
    """What is wrong with models that are adapters, as they are written."""
    data: Mapping[str, Any] = document.data
    if is_adapter(data.get("base")):
        adapter = data["base"]["adapter"]
        fix = f"write base: {{source: MODEL, adapters: [{adapter}]}}, or base: MODEL"
        yield document.error(("base", "adapter"), "the base is a whole model, not an adapter", fix)
    for name, reference in data["models"].items() if has_adapters(data) else ():
        if is_adapter(reference):
            yield from _problems(document, ("models", name), reference)


def _problems(document: Document, place: Place, reference: Mapping[str, Any]) -> Iterator[RecipeError]:
    for key in (key for key in _OTHERS if key in reference):
        full = {"source": reference.get("source", "MODEL"), "adapters": f"[{reference['adapter']}]"}
        fix = f"remove `{key}`, or write {{source: {full['source']}, adapters: {full['adapters']}}}"
        yield document.error((*place, key), f"`adapter` is a model by itself, so `{key}` cannot go with it", fix)
    if "base" not in document.data and not makes_adapter(document.data):
        what = "an adapter is a model only together with the model that it was trained on, and the recipe has no base"
        yield document.error((*place, "adapter"), what, "add base: MODEL")


def on_their_base(recipe: Recipe) -> Recipe:
    """The recipe with every model that is an adapter as the base with that adapter."""
    data = recipe.document
    if recipe.base is None or not has_adapters(data):
        return recipe
    adapters = {name: model for name, model in data["models"].items() if is_adapter(model)}
    full = {name: TypeAdapter(Reference).validate_python(over(data["base"], model)) for name, model in adapters.items()}
    inner = {**recipe.inner, **(dict.fromkeys(adapters, recipe.inner["base"]) if "base" in recipe.inner else {})}
    base = recipe.base if names_base(data) else None
    if base is None:
        inner.pop("base", None)
    return replace(recipe, base=base, models={**recipe.models, **full}, inner=inner)
