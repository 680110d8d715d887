"""Checks of the section `calibration` that need the method and the models."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergetool.errors import RecipeError
from mergetool.methods import method_named
from mergetool.methods.base import Method
from mergetool.recipe.data import SHARED, form_of
from mergetool.recipe.document import Document
from mergetool.recipe.render import suggestion
from mergetool.recipe.then import steps_in

_OTHER = "choose a method that needs none: mergetool methods"
_WAY = (
    "try its numbers with merge: {method: ...} and sweep: {NUMBER: [...]}, for which data are measured once, and score "
    "the results: mergetool evaluate PATH --tasks ..."
)
_SAY = "calibration: {data: ./FILE.jsonl}"


def calibration_problems(
    document: Document, kind: type[Method], method: Method | None, models: Mapping[str, Any]
) -> Iterator[RecipeError]:
    """Whether there is data where it is needed, and only there, for all models that there are."""
    data, name = document.data.get("calibration"), kind.method_name()
    step = next((step.step_name() for _, step in steps_in(document.data) if step.statistic), None)
    for field, part in _inside(document, kind, method).items():
        if part.statistic:
            what = f"{part.method_name()} needs data, which only the method of the whole recipe can be given"
            yield document.error(("merge", field), what, _WAY if field == "inner" else _OTHER)
    if kind.statistic and data is None:
        what = f"{name} measures the models on data, and the recipe names none"
        yield document.error(("merge", "method"), what, f"add {_SAY} (merge_state_dicts takes `statistics` instead)")
    elif step and kind.searches:
        what = f"{step} needs data, and candidates of a search are not measured"
        yield document.error(("then",), what, "remove that step, and run it on the best recipe that is found")
    elif step and kind.on_base:
        what = f"{name} and {step} both measure the base, on data of two kinds"
        yield document.error(("then",), what, "remove that step")
    elif kind.on_base and form_of(data) == SHARED:
        what = f"{name} compares the rows of each model with new ones, and here all are the same"
        fix = "write {base: {data: ./NEW.jsonl}, MODEL: {data: ./ITS.jsonl}, ...}"
        yield document.error(("calibration",), what, fix)
    elif step and data is None:
        what = f"{step} measures the base on data, and the recipe names none"
        yield document.error(("then",), what, f"add {_SAY} (merge_state_dicts takes `statistics` of `base` instead)")
    elif data is not None and not kind.statistic and not step:
        what = f"{name} measures nothing on data, so this would have no effect"
        yield document.error(("calibration",), what, "remove `calibration`")
    elif isinstance(data, dict):
        measured = [*(models if kind.statistic else ()), *(["base"] if step or kind.on_base else ())]
        yield from _names(document, data, measured)


def _inside(document: Document, kind: type[Method], method: Method | None) -> Mapping[str, type[Method]]:
    """Methods inside the recipe's, by field: those that merge for it, and the one whose settings it searches."""
    found = {} if method is None else {field: type(part) for field, part in method.parts().items()}
    inner = document.data["merge"].get("inner") if kind.searches else None
    name = inner.get("method") if isinstance(inner, dict) else None
    own = method_named(name) if isinstance(name, str) else None
    return {**found, **({"inner": own} if own is not None else {})}


def _names(document: Document, data: Mapping[str, Any], models: Sequence[str]) -> Iterator[RecipeError]:
    """Whether there is data for each of what is measured, and for nothing else."""
    if form_of(data) == SHARED:
        if isinstance(data.get("measured"), str):
            fix = f"write {{{models[0]}: {{measured: {data['measured']}}}, ...}}"
            yield document.error(("calibration", "measured"), "is the statistic of one model, but of which?", fix)
        return
    for name in data:
        if name not in models:
            there = name in document.data["models"] or name == "base"
            what = f"{name!r} is not measured, so this would have no effect" if there else f"there is no model {name!r}"
            fix = suggestion(name, models) or f"what is measured: {', '.join(models)}"
            yield document.error(("calibration", name), what, fix)
    for name in models:
        if name not in data:
            about = "the base" if name == "base" else f"model {name!r}"
            yield document.error(("calibration",), f"nothing for {about}", f"add {name}: {{data: ./FILE.jsonl}}")
