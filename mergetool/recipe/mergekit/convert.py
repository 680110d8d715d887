"""mergekit recipes as ours: what people have already written runs as it is, with mergekit's numbers.

A YAML file with `merge_method:` is one. Its settings become fields of our method; what varies by tensor becomes
overrides. Where the two languages differ:

    precedence    model > slice > whole recipe; a list of filters in which none matches falls through to the next
    filter        a substring of the tensor's name (see `filters`)
    gradient      a list of values along depth; tensors outside the layers take its first value in both
    base_model    the common ancestor, except for slerp (the model at t = 0) and linear (one more model)
    dtype         how the result is stored; sums are float32 even where mergekit would round every step to 16 bits
    slices        only those that are the whole model: layers are not cut or stacked
    paths         relative to the current folder

Whatever has no counterpart is refused at its line; nothing is silently left out.

Reference: mergekit 0.1.5, https://github.com/arcee-ai/mergekit; tests/peers compares the numbers.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergetool.errors import RecipeError
from mergetool.methods import registry
from mergetool.recipe.document import Document, Place, read_document
from mergetool.recipe.mergekit.counterparts import METHODS, Counterpart
from mergetool.recipe.mergekit.filters import Branch, Case, cases, globs
from mergetool.recipe.mergekit.parameters import Scope, branches_of, check_keys
from mergetool.recipe.render import suggestion
from mergetool.recipe.schema import expanded
from mergetool.tensors.side_files import read_config

_TOP_KEYS = ("merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source")
_STORED = ("float32", "bfloat16", "float16")


def is_mergekit(data: Any) -> bool:
    """Whether parsed YAML is a mergekit recipe."""
    return isinstance(data, dict) and "merge_method" in data


def convert(document: Document) -> Document:
    """Our recipe for a mergekit one. Places keep the lines of the original; paths are relative to the current folder.

    Raises RecipeError holding every problem found.
    """
    importer = _Importer(document)
    try:
        data = importer.convert()
    except RecipeError as error:
        importer.problems += error.problems
    if importer.problems:
        raise RecipeError.of(importer.problems)
    return Document(document.name, data, importer.marks, Path.cwd())


@dataclass(frozen=True)
class _Source:
    """One merged model: its name with us, and its own parameters."""

    name: str
    reference: str
    own: Scope
    place: Place


class _Importer:
    """One conversion: the document, problems found so far, and where each of our values comes from."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.data: Mapping[str, Any] = document.data
        self.problems: list[RecipeError] = []
        self.marks: dict[Place, tuple[int, int]] = {(): document.marks.get((), (1, 1))}
        self.shared: list[Scope] = []
        """Parameters of the slice, then of the whole recipe."""

    def convert(self) -> dict[str, Any]:
        self.problems += check_keys(self.document, (), self.data, _TOP_KEYS)
        target = self._counterpart()
        sources, base = self._models(target)
        self.shared.append(self._scope(self.data, ()))
        out: dict[str, Any] = {}
        if base is not None:
            out["base"] = self._reference(base, ("base",), ("base_model",))
        out["models"] = {s.name: self._reference(s.reference, ("models", s.name), s.place) for s in sources}
        out["merge"] = self._merge(target, sources)
        return out | self._storage() | self._tokenizer(sources, base)

    def _problem(self, place: Place, what: str, fix: str) -> None:
        self.problems.append(self.document.error(place, what, fix))

    def _mark(self, place: Place, origin: Place) -> None:
        """Errors about our `place` will point to the line of `origin`, or of what holds it."""
        while origin not in self.document.marks and origin:
            origin = origin[:-1]
        if origin in self.document.marks:
            self.marks.setdefault(place, self.document.marks[origin])

    def _scope(self, holder: Mapping[str, Any], place: Place) -> Scope:
        parameters = holder.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise self.document.error((*place, "parameters"), "expected a mapping", "write parameters: {name: value}")
        return Scope(parameters, (*place, "parameters"))

    def _counterpart(self) -> Counterpart:
        name = str(self.data["merge_method"])
        target = METHODS.get(name)
        if target is None or target.method not in registry():
            fix = suggestion(name, METHODS) or f"supported: {', '.join(METHODS)}"
            raise self.document.error(("merge_method",), f"mergekit's method {name!r} has no counterpart here", fix)
        self._mark(("merge",), ("merge_method",))
        return target

    def _models(self, target: Counterpart) -> tuple[list[_Source], str | None]:
        """The models to merge, in order, and the common ancestor where there is one."""
        entries = self._entries()
        base = self.data.get("base_model")
        if base is not None and not isinstance(base, str):
            raise self.document.error(("base_model",), "expected a path or model id", "write the model as text")
        needed = target.base == "ancestor" or target.method == "slerp"
        if base is None and needed:
            raise self.document.error((), f"{self.data['merge_method']} needs a base model", "add base_model: MODEL")
        for index, (reference, _, place) in enumerate(entries):
            if any(reference == earlier for earlier, _, _ in entries[:index]):
                self._problem(place, f"{reference} is listed twice", "keep one entry")
        others = [entry for entry in entries if entry[0] != base]
        if target.base == "ancestor":
            entries = others
        elif base is not None:
            listed = [entry for entry in entries if entry[0] == base]
            entries = [*(listed or [(base, Scope({}, ()), ("base_model",))]), *others]
        names = _unique([reference for reference, _, _ in entries])
        sources = [_Source(name, *entry) for name, entry in zip(names, entries, strict=True)]
        return sources, base if target.base == "ancestor" else None

    def _entries(self) -> list[tuple[str, Scope, Place]]:
        """(reference, parameters, place) of every listed model."""
        if bool(self.data.get("models")) == bool(self.data.get("slices")):
            raise self.document.error((), "one of `models` and `slices` is needed", "list the models under `models`")
        known = ["model", "parameters"]
        place: Place = ("models",)
        listed = self.data.get("models")
        if not listed:
            known.append("layer_range")
            listed, place = self._whole_slice()
        if not isinstance(listed, list):
            raise self.document.error(place, "expected a list of models", "write - model: MODEL")
        found = []
        for index, entry in enumerate(listed):
            here: Place = (*place, index)
            self.problems += check_keys(self.document, here, entry, known)
            reference = entry.get("model")
            if not isinstance(reference, str):
                raise self.document.error(here, "expected `model`, a path or model id", "write - model: MODEL")
            if "layer_range" in known:
                self._check_range(reference, entry.get("layer_range"), (*here, "layer_range"))
            found.append((reference, self._scope(entry, here), here))
        return found

    def _whole_slice(self) -> tuple[Any, Place]:
        """The sources of the only slice."""
        slices = self.data["slices"]
        place: Place = ("slices", 0)
        if not isinstance(slices, list) or len(slices) != 1:
            what = "slices that cut or stack layers are not supported"
            raise self.document.error(("slices",), what, "list whole models under `models`")
        self.problems += check_keys(self.document, place, slices[0], ("sources", "parameters"))
        self.shared.append(self._scope(slices[0], place))
        return slices[0].get("sources"), (*place, "sources")

    def _check_range(self, reference: str, wanted: Any, place: Place) -> None:
        config = read_config(expanded(reference))
        layers = next((config[k] for k in ("num_hidden_layers", "n_layer", "num_layers") if k in config), None)
        if layers is None:
            what = f"cannot tell whether layer_range is the whole model: {reference}/config.json does not say"
            self._problem(place, what, "list whole models under `models`")
        elif wanted != [0, layers]:
            what = f"layer_range is {wanted}, the layers of {reference} are [0, {layers}]"
            self._problem(place, what, "layers cannot be cut or stacked; take all of them")

    def _reference(self, reference: str, place: Place, origin: Place) -> Any:
        self._mark(place, origin)
        source, plus, adapter = reference.partition("+")
        if not plus or _is_there(reference):
            return reference
        return {"source": source, "adapters": [adapter]}

    def _merge(self, target: Counterpart, sources: Sequence[_Source]) -> dict[str, Any]:
        own = [key for key, parameter in target.parameters.items() if parameter.per_model]
        for model in sources:
            self._check_parameters(model.own, [*own, *target.without_effect])
        for scope in self.shared:
            self._check_parameters(scope, [*target.parameters, *target.without_effect])
        fields = registry()[target.method].model_fields
        cells: dict[tuple[str, str | None], list[Branch]] = {}
        for key, parameter in target.parameters.items():
            for source in sources if parameter.per_model else [None]:
                scopes = [*([source.own] if source else []), *self.shared]
                try:
                    branches = branches_of(self.document, key, parameter, scopes)
                except RecipeError as error:
                    self.problems.append(error)
                    continue
                if any(branch.place for branch in branches) or parameter.default != fields[parameter.field].default:
                    cells[parameter.field, source.name if source else None] = branches
        return {"method": target.method, **target.constants, **self._fields(cells)} if not self.problems else {}

    def _check_parameters(self, scope: Scope, known: Sequence[str]) -> None:
        for key in scope.parameters:
            if key not in known:
                what = f"parameter {key!r} of mergekit's {self.data['merge_method']} is not supported here"
                fix = suggestion(str(key), known) or f"supported here: {', '.join(known)}"
                self._problem((*scope.place, key), what, fix)

    def _fields(self, cells: Mapping[tuple[str, str | None], list[Branch]]) -> dict[str, Any]:
        """Our fields, with overrides for what depends on filters."""
        try:
            *filtered, rest = cases(cells)
        except ValueError as error:
            raise self.document.error(("parameters",), str(error), "use the same filters for every model") from None
        out = self._values(rest, ("merge",))
        varying = {name for (name, _), branches in cells.items() if len(branches) > 1}
        overrides = [(glob, case) for case in filtered for glob in globs(case.texts)]
        if overrides:
            out["overrides"] = [
                {"match": glob, **self._values(case, ("merge", "overrides", index), varying)}
                for index, (glob, case) in enumerate(overrides)
            ]
        return out

    def _values(self, case: Case, place: Place, only: set[str] | None = None) -> dict[str, Any]:
        """Our fields in one case: one value for all models where they agree, else one for each."""
        values: dict[str, dict[str | None, Branch]] = {}
        for (name, model), branch in case.branches.items():
            if only is None or name in only:
                values.setdefault(name, {})[model] = branch
        out: dict[str, Any] = {}
        for name, by_model in values.items():
            first, *others = by_model.values()
            self._mark((*place, name), first.place)
            if all(other.value == first.value for other in others):
                out[name] = first.value
                continue
            out[name] = {model: branch.value for model, branch in by_model.items()}
            for model, branch in by_model.items():
                self._mark((*place, name, str(model)), branch.place)
        return out

    def _storage(self) -> dict[str, Any]:
        """`compute` and `output`."""
        names = {k: str(self.data[k]).removeprefix("torch.") for k in ("dtype", "out_dtype") if self.data.get(k)}
        out: dict[str, Any] = {"compute": {"dtype": "float64"}} if names.get("dtype") == "float64" else {}
        key = "out_dtype" if "out_dtype" in names else "dtype"
        if key in names:
            if names[key] not in _STORED:
                self._problem((key,), f"results cannot be stored as {names[key]}", f"add out_dtype: {_STORED[0]}")
            out["output"] = {"dtype": names[key]}
        return out

    def _tokenizer(self, sources: Sequence[_Source], base: str | None) -> dict[str, Any]:
        wanted = self.data.get("tokenizer_source")
        if wanted is None:
            return {}
        known = {source.reference: source.name for source in sources} | ({base: "base"} if base else {})
        if wanted == "base":
            wanted = self.data.get("base_model")
        if not isinstance(wanted, str) or wanted not in known:
            what = f"tokenizer_source {self.data['tokenizer_source']!r} is not supported"
            self._problem(("tokenizer_source",), what, "write `base`, or the model whose tokenizer to take")
            return {}
        return {"tokenizer": {"source": known[wanted]}}


def _unique(references: Sequence[str]) -> list[str]:
    """A name for each model: the last part of its path, numbered where two are alike."""
    names: list[str] = []
    for reference in references:
        stem = Path(reference.partition("+")[0].partition("@")[0]).name.removesuffix(".safetensors") or "model"
        stem = f"{stem}-model" if stem in ("base", "gradient") else stem
        copies = sum(name == stem or name.startswith(f"{stem}-") for name in names)
        names.append(f"{stem}-{copies + 1}" if stem in names else stem)
    return names


def converted_text(path: Path, folder: Path) -> str:
    """Our YAML for a mergekit file, with paths that are right from `folder`. Raises RecipeError."""
    document = read_document(path)
    if not is_mergekit(document.data):
        raise document.error((), "this is not a mergekit recipe (it has no merge_method)", "mergetool run takes ours")
    data = convert(document).data
    models = {name: _seen_from(reference, folder) for name, reference in data["models"].items()}
    base = {"base": _seen_from(data["base"], folder)} if "base" in data else {}
    return yaml.safe_dump({**base, **data, **base, "models": models}, sort_keys=False, allow_unicode=True)


def _is_there(reference: str) -> bool:
    try:
        return expanded(reference).exists()
    except OSError:  # too long for a path
        return False


def _seen_from(reference: Any, folder: Path) -> Any:
    if not isinstance(reference, str) or not _is_there(reference):
        return reference
    target = expanded(reference)
    return str(target) if target.is_absolute() else os.path.relpath(target, folder)
