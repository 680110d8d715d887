"""Checks of `output.kind: adapter`: what an adapter can hold, and settings that would have no effect."""

from collections.abc import Iterator, Mapping
from typing import Any

from mergetool.errors import RecipeError
from mergetool.layouts.base import Layout
from mergetool.methods.base import Method
from mergetool.recipe.adapters import is_alone, makes_adapter
from mergetool.recipe.document import Document

_OF_ADAPTERS = ("rank", "base")
_OF_CHECKPOINTS = ("shard_size", "keep_float32")
_NEW_WORDS = ("tokenizer", "chat_template")


def check_kind(document: Document, kind: type[Method], layout: Layout) -> Iterator[RecipeError]:
    """What cannot be an adapter, and what only adapters (or only checkpoints) have."""
    data: Mapping[str, Any] = document.data
    output = _output(data)
    if not makes_adapter(data):
        for key in _OF_ADAPTERS:
            if key in output:
                what = f"only an adapter has a {key}, so this would have no effect"
                yield document.error(("output", key), what, f"remove `{key}`, or write kind: adapter")
        return
    yield from _check_method(document, kind, layout)
    if "base" not in data and kind.needs_base != "required" and not is_alone(data):
        what = "an adapter holds what is changed of a base, and the recipe has none"
        yield document.error(("output", "kind"), what, "add base: PATH")
    if output.get("rank") is None and not is_alone(data):
        what = "a change has as many directions as its tensor is wide, and an adapter keeps the leading ones"
        fix = "add rank: 32, or a share such as rank: {energy: 0.99}, or rank: exact for all of them"
        yield document.error(("output",), what, fix)
    for key in _OF_CHECKPOINTS:
        if key in output:
            what = "an adapter is one file of factors, so this would have no effect"
            yield document.error(("output", key), what, f"remove `{key}`")
    for key in _NEW_WORDS:
        if key in data:
            what = "an adapter has the vocabulary and the templates of its base"
            yield document.error((key,), what, f"remove `{key}`, or write kind: checkpoint")
    if "evaluate" in data:
        what = "an adapter is no model by itself, so there is nothing to score"
        fix = "remove `evaluate`, or add base: MODEL and output: {kind: checkpoint}"
        yield document.error(("evaluate",), what, fix)


def _check_method(document: Document, kind: type[Method], layout: Layout) -> Iterator[RecipeError]:
    name = kind.method_name()
    if kind.searches or kind.result != "checkpoint" or kind.uses_architecture or kind.arranges:
        what = f"what {name} leaves is no change of one base, so no adapter can hold it"
        fix = "remove `kind`" if "kind" in _output(document.data) else "add base: MODEL"
        yield document.error(("output", "kind"), what, f"{fix}, or choose another method (mergetool methods)")
    if type(layout).model_fields and not kind.arranges:
        section = next(iter(type(layout).model_fields))
        what = f"`{section}` makes another network than the base, so no adapter can hold it"
        yield document.error((section,), what, "write kind: checkpoint")


def _output(data: Mapping[str, Any]) -> Mapping[str, Any]:
    output = data.get("output")
    return output if isinstance(output, dict) else {}
