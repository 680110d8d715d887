"""Checks of a recipe that need several of its sections: names of models, bases, settings that would have no effect."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergetool.errors import RecipeError
from mergetool.methods.base import FittedMethod, Gradient, Method
from mergetool.recipe.document import Document, Place
from mergetool.recipe.model import Check, ModelReference, Override, Tokenizer
from mergetool.recipe.render import suggestion

_RESERVED = ("base", "gradient")


def cross_checks(
    document: Document,
    sections: Mapping[str, Any],
    kind: type[Method] | None,
    method: Method | None,
    overrides: Sequence[Override],
) -> Iterator[RecipeError]:
    """Checks that need several sections; each runs as soon as the sections it needs are valid."""
    models: Mapping[str, ModelReference] | None = sections.get("models")
    has_base = "base" in document.data
    if models is not None:
        yield from _check_names(document, models)
        if kind is not None:
            if "architecture" in document.data and not issubclass(kind, FittedMethod):
                what = f"{kind.method_name()} does not look at the architecture, so this would have no effect"
                yield document.error(("architecture",), what, "remove `architecture`")
            inner = method.inner() if isinstance(method, FittedMethod) else kind
            yield from _check_method(document, models, kind, has_base)
            if isinstance(inner, Method):
                yield from _check_inner(document, models, inner, has_base)
            yield from _check_overrides(document, models, kind, overrides, has_base)
        if method is not None:
            yield from _check_per_model(
                document, ("merge",), {key: getattr(method, key) for key in method.knobs()}, models
            )
    check: Check | None = sections.get("check")
    if check is not None and check.missing == "base" and not has_base:
        yield document.error(
            ("check", "missing"), "`base` needs a base, and the recipe has none", "write missing: skip"
        )
    tokenizer: Tokenizer | None = sections.get("tokenizer")
    if tokenizer is not None and models is not None:
        yield from _check_use(document, ("tokenizer", "source"), tokenizer.source, models, has_base)


def _check_names(document: Document, models: Mapping[str, ModelReference]) -> Iterator[RecipeError]:
    for name in models:
        if name in _RESERVED or not name or name != name.strip():
            yield document.error(("models", name), f"a model cannot be called {name!r}", "choose another name")


def _check_method(
    document: Document, models: Mapping[str, ModelReference], method: type[Method], has_base: bool
) -> Iterator[RecipeError]:
    name = method.method_name()
    if method.needs_base == "required" and not has_base:
        yield document.error(("merge", "method"), f"{name} needs the common ancestor of the models", "add base: PATH")
    if method.needs_base == "unused" and has_base:
        fix = "remove `base`, or list it under `models` to merge it too"
        yield document.error(("base",), f"{name} does not use a base, so this would have no effect", fix)
    if len(models) < method.min_models:
        yield document.error(
            ("models",), f"{name} needs at least {method.min_models} models, not {len(models)}", "add one"
        )
    if method.max_models is not None and len(models) > method.max_models:
        what = f"{name} takes at most {method.max_models} models, not {len(models)}"
        yield document.error(("models",), what, "remove some, or choose another method (mergetool methods)")


def _check_inner(
    document: Document, models: Mapping[str, ModelReference], inner: Method, has_base: bool
) -> Iterator[RecipeError]:
    """The method inside a fitted one works on the same models."""
    name = inner.method_name()
    if inner.needs_base == "required" and not has_base:
        what = f"{name} needs a common ancestor, and models to be aligned have none"
        yield document.error(("merge", "combine"), what, "choose a method without a base: mergetool methods")
    if inner.max_models is not None and len(models) > inner.max_models:
        what = f"{name} takes at most {inner.max_models} models, not {len(models)}"
        yield document.error(("merge", "combine"), what, "remove some, or choose another method (mergetool methods)")
    values = {key: getattr(inner, key) for key in inner.knobs()}
    yield from _check_per_model(document, ("merge", "combine"), values, models)


def _check_per_model(
    document: Document, place: Place, values: Mapping[str, Any], models: Mapping[str, ModelReference]
) -> Iterator[RecipeError]:
    for key, value in values.items():
        if not isinstance(value, dict) or isinstance(value, Gradient):
            continue
        for name in value:
            if name not in models:
                fix = suggestion(name, models) or f"the models are: {', '.join(models)}"
                yield document.error((*place, key, name), f"there is no model {name!r}", fix)
        for name in models:
            if name not in value:
                yield document.error((*place, key), f"no value for model {name!r}", f"add {name}: to {key}")


def _check_overrides(
    document: Document,
    models: Mapping[str, ModelReference],
    method: type[Method],
    overrides: Sequence[Override],
    has_base: bool,
) -> Iterator[RecipeError]:
    knobs = method.knobs()
    for index, override in enumerate(overrides):
        place: Place = ("merge", "overrides", index)
        settings = override.settings()
        if override.use is not None:
            yield from _check_use(document, (*place, "use"), override.use, models, has_base)
            if settings:
                what = f"`use` copies tensors, so {', '.join(settings)} would have no effect"
                yield document.error(place, what, "keep `use`, or the settings")
        elif not settings:
            yield document.error(place, "this override changes nothing", "add `use: MODEL` or a setting")
        yield from _check_per_model(document, place, {k: v for k, v in settings.items() if k in knobs}, models)


def _check_use(
    document: Document, place: Place, name: str, models: Mapping[str, ModelReference], has_base: bool
) -> Iterator[RecipeError]:
    known = [*(["base"] if has_base else []), *models]
    if name not in known:
        fix = suggestion(name, known) or f"one of: {', '.join(known)}"
        yield document.error(place, f"there is no model {name!r}", fix)
