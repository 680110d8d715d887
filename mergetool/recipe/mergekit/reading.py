"""The models of a mergekit recipe as one list of parts, whether it lists `models`, `slices`, or one of `modules`.

A part is one slice of the output: its sources with their layers, its own parameters, its own base. Whole models are one
part without layer numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergetool.recipe.document import Place
from mergetool.recipe.mergekit.findings import Findings
from mergetool.recipe.mergekit.parameters import Scope

Span = tuple[int, int]
_TOP = ("merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype")
TOP_KEYS = (*_TOP, "tokenizer_source", "tokenizer", "chat_template", "name")
_FORMS = ("models", "slices", "modules")


@dataclass(frozen=True)
class Source:
    """One model of a part: what it is called in the file, its own parameters, and its layers."""

    reference: str
    own: Scope
    place: Place
    span: Span | None = None


@dataclass(frozen=True)
class OutputSlice:
    """One slice of the output, or all of it."""

    sources: Sequence[Source]
    scopes: Sequence[Scope]
    """Parameters of the slice, the module and the whole recipe."""
    base: str | None
    place: Place


class Reading:
    """The parts of one recipe; what is wrong and what is idle goes to `findings`."""

    def __init__(self, findings: Findings, data: Mapping[str, Any]) -> None:
        self.findings = findings
        self.data = data
        self.base = self.reference(data["base_model"], ("base_model",)) if data.get("base_model") else None

    def parts(self) -> list[OutputSlice]:
        """Raises RecipeError where there is nothing to merge, or it cannot be told what."""
        held, place, scopes = self.data, Place(), [self.scope(self.data, ())]
        if self._form(held, place, _FORMS) == "modules":
            held, place = self._module()
            scopes.insert(0, self.scope(held, place))
        if self._form(held, place, _FORMS[:2]) == "models":
            sources = list(self._sources(held["models"], (*place, "models"), ("model", "parameters")))
            return [OutputSlice(sources, scopes, self.base, (*place, "models"))]
        return list(self._slices(held["slices"], (*place, "slices"), scopes))

    def scope(self, holder: Mapping[str, Any], place: Place) -> Scope:
        """Its `parameters`. Raises RecipeError."""
        here: Place = (*place, "parameters")
        parameters = holder.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise self.findings.stop(here, "expected a mapping", "write parameters: {name: value}")
        return Scope(parameters, here)

    def reference(self, value: Any, place: Place) -> str:
        """A model as mergekit writes it in one text: PATH@REVISION+LORA@REVISION. Raises RecipeError."""
        if isinstance(value, dict) and "model" in value:
            self.findings.stray(value, place, ("model", "lora", "override_architecture"), {})
            if value.get("override_architecture"):
                self.findings.idle(["override_architecture"], place, "tensors are matched by their names")
            lora = f"+{self._path(value['lora'], (*place, 'lora'))}" if value.get("lora") else ""
            return f"{self._path(value['model'], (*place, 'model'))}{lora}"
        return self._path(value, place)

    def _path(self, value: Any, place: Place) -> str:
        if isinstance(value, dict) and isinstance(value.get("path"), str):
            self.findings.stray(value, place, ("path", "revision"), {})
            return f"{value['path']}@{value['revision']}" if value.get("revision") else str(value["path"])
        if not isinstance(value, str) or not value:
            raise self.findings.stop(place, f"expected a path or model id, found {value!r}", "write the model as text")
        return value

    def _form(self, held: Mapping[str, Any], place: Place, known: Sequence[str]) -> str:
        given = [key for key in known if held.get(key)]
        if len(given) != 1:
            told = " and ".join(f"`{key}`" for key in given) or "none"
            what = f"one of {', '.join(f'`{key}`' for key in known)} is needed, and here are {told}"
            raise self.findings.stop(place, what, "list the models under `models`")
        return given[0]

    def _module(self) -> tuple[Mapping[str, Any], Place]:
        """The only module of a recipe, or one of several that are alike. Raises RecipeError."""
        modules = self.findings.mapping(self.data["modules"], ("modules",), ("default",))
        (name, held), *others = modules.items()
        if any(other != held for _, other in others):
            what = f"the modules {', '.join(map(str, modules))} are merged by rules of their own"
            raise self.findings.stop(("modules",), what, "merge the whole models: list them under `models`")
        place: Place = ("modules", str(name))
        known = ("models", "slices", "parameters")
        self.findings.stray(self.findings.mapping(held, place, known), place, known, {})
        if others and held.get("slices"):
            raise self.findings.stop(place, "several modules are cut into slices", "list whole models under `models`")
        return held, place

    def _slices(self, listed: Any, place: Place, scopes: Sequence[Scope]) -> Iterator[OutputSlice]:
        if not isinstance(listed, list):
            raise self.findings.stop(place, "expected a list of slices", "write - sources: [...]")
        known = ("sources", "base_model", "residual_weight", "parameters")
        for index, held in enumerate(listed):
            here: Place = (*place, index)
            self.findings.stray(self.findings.mapping(held, here, known), here, known, _HINTS)
            if held.get("residual_weight") is not None:
                self.findings.idle(["residual_weight"], here, "mergekit reads it and never uses it")
            base = self.base
            if held.get("base_model"):
                base = self.reference(held["base_model"], (*here, "base_model"))
            keys = ("model", "layer_range", "parameters")
            sources = list(self._sources(held.get("sources"), (*here, "sources"), keys))
            yield OutputSlice(sources, [self.scope(held, here), *scopes], base, here)

    def _sources(self, listed: Any, place: Place, known: Sequence[str]) -> Iterator[Source]:
        if not isinstance(listed, list) or not listed:
            raise self.findings.stop(place, "expected a list of models", "write - model: MODEL")
        seen: set[str] = set()
        for index, entry in enumerate(listed):
            here: Place = (*place, index)
            self.findings.stray(self.findings.mapping(entry, here, known), here, known, _HINTS)
            if "model" not in entry:
                raise self.findings.stop(here, "expected `model`, a path or model id", "write - model: MODEL")
            reference = self.reference(entry["model"], (*here, "model"))
            if reference in seen:
                self.findings.problem(here, f"{reference} is listed twice", "keep one entry")
            seen.add(reference)
            span = self._span(entry, (*here, "layer_range")) if "layer_range" in known else None
            yield Source(reference, self.scope(entry, here), here, span)

    def _span(self, entry: Mapping[str, Any], place: Place) -> Span:
        """Layers from the first to the end. Raises RecipeError."""
        value: Any = entry.get("layer_range")
        whole = isinstance(value, list) and len(value) == 2 and all(_is_count(item) for item in value)
        if whole and float(value[0]) >= float(value[1]):
            fix = "leave the slice out; embeddings of another model: outside: {first: MODEL} in a recipe of ours"
            raise self.findings.stop(place, f"{value} holds no layer: the end is not part of it", fix)
        if not whole:
            what = f"expected the first layer and the end, found {value!r}" if value else "`layer_range` is required"
            raise self.findings.stop(place, what, "write layer_range: [0, 16]; whole models go under `models`")
        return int(float(value[0])), int(float(value[1]))


def _is_count(value: Any) -> bool:
    return not isinstance(value, bool) and str(value).removesuffix(".0").isdecimal()


_HINTS = {
    "revision": "write it behind the model: model: PATH@REVISION",
    "layer_range": "layers are taken apart under `slices` only",
    "weight": "write it inside `parameters`",
    "density": "write it inside `parameters`",
    "scale": "write it inside `parameters`",
}
