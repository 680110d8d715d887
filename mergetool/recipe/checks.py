"""Checks of a recipe that need several of its sections: names of models, bases, settings that would have no effect."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from mergetool.arch.code import code_of
from mergetool.errors import RecipeError
from mergetool.layouts.base import Layout
from mergetool.methods.base import Method
from mergetool.recipe.adapter_output import check_kind
from mergetool.recipe.adapters import adapter_problems, has_adapters, is_alone, makes_adapter, names_base
from mergetool.recipe.calibration import calibration_problems
from mergetool.recipe.document import Document, Place
from mergetool.recipe.render import suggestion
from mergetool.recipe.then import base_for_steps, steps_in
from mergetool.recipe.words import AUTO, TEMPLATES, UNION, is_place, models_named

_RESERVED = ("base", "gradient")


def cross_checks(
    document: Document, kind: type[Method] | None, method: Method | None, layout: Layout
) -> Iterator[RecipeError]:
    """Checks that need several sections, of what was written: a mistake elsewhere hides none of these."""
    data: Mapping[str, Any] = document.data
    models = data.get("models")
    has_base = names_base(data)
    yield from adapter_problems(document)
    if kind is not None:
        yield from _check_base(document, kind)
        yield from check_kind(document, kind, layout)
    if isinstance(models, dict):
        yield from _check_names(document, models)
        if kind is not None:
            yield from _check_then(document, kind)
            yield from _check_heads(document, models, kind)
            yield from _check_count(document, models, kind, layout)
            yield from _check_per_model(document, ("merge",), kind, data["merge"], models)
            yield from _check_overrides(document, kind, models)
            yield from calibration_problems(document, kind, method, models)
        for field, name in () if method is None else method.model_names().items():
            yield from _check_use(document, tuple(field.split(".")), name, models)
        for field, part in () if method is None else method.parts().items():
            yield from _check_part(document, models, field, part, has_base)
        yield from _check_words(document, models)
        if kind is not None and (kind.searches or kind.result != "checkpoint"):
            yield from _check_plain_words(document, kind)
    if _in(data, "output", "keep_float32") is not None and _in(data, "output", "dtype") not in ("bfloat16", "float16"):
        what = "without an output.dtype of 16 bits nothing is narrowed, so this would have no effect"
        yield document.error(("output", "keep_float32"), what, "remove `keep_float32`, or write dtype: bfloat16")
    if _in(data, "check", "missing") == "base" and not has_base:
        what = "`base` needs a base, and the recipe has none"
        yield document.error(("check", "missing"), what, "write missing: skip")
    if _in(data, "check", "extra") is not None and not has_base:
        what = "without a base no tensor is extra, so this would have no effect"
        yield document.error(("check", "extra"), what, "remove `extra`")


def _check_words(document: Document, models: Collection[str]) -> Iterator[RecipeError]:
    """Models that the sections about words name, and templates that there are."""
    tokenizer, template = document.data.get("tokenizer"), document.data.get("chat_template")
    for place, name in models_named(tokenizer if isinstance(tokenizer, dict) else {}).items():
        yield from _check_use(document, ("tokenizer", *place), name, models)
    source = _in(document.data, "tokenizer", "source")
    if _in(document.data, "tokenizer", "missing") == "omp" and not is_place(str(source)):
        what = f"omp makes rows from those of another model, and the tokens of {source} have their own"
        yield document.error(("tokenizer", "missing"), what, "write source: ./FOLDER of that model, or missing: mean")
    named = template.get("name") if isinstance(template, dict) else template
    if isinstance(named, str) and is_place(named):
        yield document.error(("chat_template",), f"{named!r} is no model", f"write {{file: {named}}}")
    else:
        yield from _check_use(document, ("chat_template",), named, models, (AUTO, *TEMPLATES))


def _check_plain_words(document: Document, kind: type[Method]) -> Iterator[RecipeError]:
    """Methods whose results are not one merge have the tokenizer of one of the models."""
    tokenizer = document.data.get("tokenizer")
    more = [key for key in tokenizer if key != "source"] if isinstance(tokenizer, dict) else []
    source = str(_in(document.data, "tokenizer", "source"))
    if source == UNION or is_place(source) or more:
        what = f"{kind.method_name()} takes models of one vocabulary"
        fix = "merge first with another method, or write tokenizer: {source: MODEL} alone"
        yield document.error(("tokenizer",), what, fix)
    if "chat_template" in document.data:
        what = f"{kind.method_name()} keeps the chat template of the tokenizer"
        yield document.error(("chat_template",), what, "write tokenizer: {source: MODEL} instead")


def _in(data: Mapping[str, Any], section: str, key: str) -> Any:
    settings = data.get(section)
    return settings.get(key) if isinstance(settings, dict) else None


def _check_names(document: Document, models: Collection[str]) -> Iterator[RecipeError]:
    for name in models:
        if name in _RESERVED or not name or name != name.strip():
            yield document.error(("models", name), f"a model cannot be called {name!r}", "choose another name")


def _check_heads(document: Document, models: Mapping[str, Any], method: type[Method]) -> Iterator[RecipeError]:
    if method.result == "bundle":
        return
    for name, reference in models.items():
        if isinstance(reference, dict) and "head" in reference:
            what = f"{method.method_name()} does not use heads, so this would have no effect"
            yield document.error(("models", name, "head"), what, "remove `head`, or use the method mass")


def _check_base(document: Document, kind: type[Method]) -> Iterator[RecipeError]:
    name, has_base = kind.method_name(), "base" in document.data
    if kind.needs_base == "required" and not has_base and not is_alone(document.data):
        yield document.error(("merge", "method"), f"{name} needs the common ancestor of the models", "add base: PATH")
    wanted = has_adapters(document.data) or makes_adapter(document.data) or base_for_steps(document.data, kind)
    if kind.needs_base == "unused" and has_base and not wanted:
        fix = "remove `base`, or list it under `models` to merge it too"
        yield document.error(("base",), f"{name} does not use a base, so this would have no effect", fix)
    if "architecture" in document.data and not (kind.uses_architecture or _runs_code(document, kind)):
        what = f"{name} does not look at the architecture, so this would have no effect"
        yield document.error(("architecture",), what, "remove `architecture`")


def _runs_code(document: Document, kind: type[Method]) -> bool:
    """Whether models are measured that a function builds, which `architecture` names."""
    from mergetool.statistics.measure import STATISTICS

    architecture = document.data["architecture"]
    measured = bool(kind.statistic) and STATISTICS[kind.statistic].plain
    return measured and isinstance(architecture, str) and code_of(architecture) is not None


def _check_then(document: Document, kind: type[Method]) -> Iterator[RecipeError]:
    """Methods that no step can follow, and steps without what they work on."""
    name = kind.method_name()
    if "then" in document.data and (kind.result != "checkpoint" or kind.arranges):
        what = f"what {name} leaves is not one tensor merged after the other, so no step can follow"
        yield document.error(("then",), what, "remove `then`, or choose another method (mergetool methods)")
    for index, step in steps_in(document.data):
        if step.needs_base and kind.uses_architecture:
            what = f"{name} aligns models without a common ancestor, and {step.step_name()} works on what was changed"
            yield document.error(("then", index), what, "remove this step")
        elif step.needs_base and "base" not in document.data and not is_alone(document.data):
            what = f"{step.step_name()} works on what merging changed of a base, and the recipe has none"
            yield document.error(("then", index), what, "add base: PATH")


def _check_count(
    document: Document, models: Collection[str], kind: type[Method], layout: Layout
) -> Iterator[RecipeError]:
    name = kind.method_name()
    if 0 < len(models) < kind.min_models:
        yield document.error(
            ("models",), f"{name} needs at least {kind.min_models} models, not {len(models)}", "add one"
        )
    if kind.max_models is not None and len(models) > kind.max_models and not layout.chooses:
        what = f"{name} takes at most {kind.max_models} models, not {len(models)}"
        yield document.error(("models",), what, "remove some, or choose another method (mergetool methods)")


def _check_part(
    document: Document, models: Collection[str], field: str, inner: Method, has_base: bool
) -> Iterator[RecipeError]:
    """A method inside another one works on the same models."""
    name = inner.method_name()
    if inner.needs_base == "required" and not has_base:
        what = f"{name} needs a common ancestor, and models to be aligned have none"
        yield document.error(("merge", field), what, "choose a method without a base: mergetool methods")
    if inner.max_models is not None and len(models) > inner.max_models:
        what = f"{name} takes at most {inner.max_models} models, not {len(models)}"
        yield document.error(("merge", field), what, "remove some, or choose another method (mergetool methods)")
    written = document.data["merge"].get(field)
    if isinstance(written, dict):
        yield from _check_per_model(document, ("merge", field), type(inner), written, models)


def _check_per_model(
    document: Document, place: Place, kind: type[Method], settings: Mapping[str, Any], models: Collection[str]
) -> Iterator[RecipeError]:
    """Mappings from models to numbers must name every model, and no others."""
    for key, schedulable in kind.schedulables().items():
        value = settings.get(key)
        if not schedulable.per_model or not isinstance(value, dict) or "gradient" in value:
            continue
        for name in value:
            if name not in models:
                fix = suggestion(name, models) or f"the models are: {', '.join(models)}"
                yield document.error((*place, key, name), f"there is no model {name!r}", fix)
        for name in models:
            if name not in value:
                yield document.error((*place, key), f"no value for model {name!r}", f"add {name}: to {key}")


def _check_overrides(document: Document, kind: type[Method], models: Collection[str]) -> Iterator[RecipeError]:
    overrides = document.data["merge"].get("overrides")
    if overrides is not None and kind.searches:
        yield document.error(("merge", "overrides"), "overrides are settings of the inner method", "move them to inner")
    for index, override in enumerate(overrides if isinstance(overrides, list) else ()):
        if isinstance(override, dict):
            yield from check_override(document, kind, ("merge", "overrides", index), override, models)


def check_override(
    document: Document, kind: type[Method], place: Place, override: Mapping[str, Any], models: Collection[str]
) -> Iterator[RecipeError]:
    """Whether one override has an effect, and names models that there are."""
    settings = {key: value for key, value in override.items() if key not in ("match", "use")}
    if "use" in override:
        yield from _check_use(document, (*place, "use"), override["use"], models)
        if settings:
            what = f"`use` copies tensors, so {', '.join(settings)} would have no effect"
            yield document.error(place, what, "keep `use`, or the settings")
    elif not settings:
        yield document.error(place, "this override changes nothing", "add `use: MODEL` or a setting")
    yield from _check_per_model(document, place, kind, settings, models)


def _check_use(
    document: Document, place: Place, name: Any, models: Collection[str], others: Sequence[str] = ()
) -> Iterator[RecipeError]:
    has_base = names_base(document.data) or is_alone(document.data)  # what adapters leave as it is
    known = [*(["base"] if has_base else []), *models]
    if isinstance(name, str) and name not in (*known, *others):
        fix = suggestion(name, (*known, *others)) or f"one of: {', '.join((*known, *others))}"
        yield document.error(place, f"there is no model {name!r}", fix)
