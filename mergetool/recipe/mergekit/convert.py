"""mergekit recipes as ours: what people have already written runs as it is, with mergekit's numbers.

A YAML file with `merge_method:` is one. Its settings become fields of our method; what varies by tensor becomes
overrides. Where the two languages differ:

    precedence    model > slice > module > whole recipe; where no filter of a list matches, the next one speaks
    filter        a substring of the tensor's name (see `filters`)
    gradient      a list of values along depth; tensors outside the layers take its first value in both
    base_model    the common ancestor, except for slerp (the model at t = 0) and linear (one more model)
    dtype         how the result is stored; sums are float32 even where mergekit would round every step to 16 bits
    stray keys    have no effect in mergekit, and none here; they are told (see `findings`)
    paths         relative to the current folder

Whatever has no counterpart is refused at its line; nothing is silently left out.

Reference: mergekit 0.1.5, https://github.com/arcee-ai/mergekit; tests/peers compares the numbers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergetool.errors import RecipeError
from mergetool.methods import registry
from mergetool.recipe.document import Document, Place
from mergetool.recipe.mergekit.counterparts import METHODS, Counterpart
from mergetool.recipe.mergekit.findings import Findings
from mergetool.recipe.mergekit.parameters import Scope
from mergetool.recipe.mergekit.reading import TOP_KEYS, OutputSlice, Reading, Source
from mergetool.recipe.mergekit.settings import SettingsReader
from mergetool.recipe.render import suggestion
from mergetool.recipe.schema import expanded

_STORED = ("float32", "bfloat16", "float16")


def is_mergekit(data: Any) -> bool:
    """Whether parsed YAML is a mergekit recipe."""
    return isinstance(data, dict) and "merge_method" in data


def convert(document: Document) -> Document:
    """Our recipe for a mergekit one. Places keep the lines of the original; paths are relative to the current folder.

    Raises RecipeError holding every problem found.
    """
    importer = _Importer(document)
    data = importer.convert()
    if importer.findings.problems:
        raise RecipeError.of(importer.findings.problems)
    return Document(document.name, data, importer.marks, Path.cwd(), warnings=importer.findings.warnings)


class _Importer:
    """One conversion: what was found, and where each of our values comes from."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.data: Mapping[str, Any] = document.data
        self.findings = Findings(document)
        self.marks: dict[Place, tuple[int, int]] = {(): document.marks.get((), (1, 1))}
        self.method = str(self.data["merge_method"])

    def convert(self) -> dict[str, Any]:
        target = self._counterpart()
        hints = dict.fromkeys(target.parameters if target else (), "write it inside `parameters`")
        self.findings.stray(self.data, (), TOP_KEYS, hints)
        storage = self._storage()
        try:
            reading = Reading(self.findings, self.data)
            parts = reading.parts()
            return {**self._merged(target, reading.base, parts), **storage} if target else {}
        except RecipeError as error:
            self.findings.problems += error.problems
            return {}

    def _mark(self, place: Place, origin: Place) -> None:
        """Errors about our `place` will point to the line of `origin`, or of what holds it."""
        while origin not in self.document.marks and origin:
            origin = origin[:-1]
        if origin in self.document.marks:
            self.marks.setdefault(place, self.document.marks[origin])

    def _counterpart(self) -> Counterpart | None:
        target = METHODS.get(self.method)
        if target is None or target.method not in registry():
            what = f"mergekit's method {self.method!r} has no counterpart here"
            fix = suggestion(self.method, METHODS) or f"supported: {', '.join(METHODS)}"
            self.findings.problem(("merge_method",), what, fix)
            return None
        self._mark(("merge",), ("merge_method",))
        return target

    def _merged(self, target: Counterpart, base: str | None, parts: Sequence[OutputSlice]) -> dict[str, Any]:
        """`base`, `models`, `slices` and `merge`."""
        if base is None and self._uses_base(target):
            fix = f"add base_model: {parts[0].sources[0].reference}"
            self.findings.problem((), f"{self.method} needs a base model", fix)
            return {}
        part, *more = parts
        if more:
            raise self.findings.stop(
                ("slices",), "slices that cut or stack layers are not supported yet", "list models"
            )
        self._check_base(target, part)
        ancestor = None if target.base == "member" else base
        merged = self._ordered(part, base, ancestor)
        self._check_count(target, merged, part)
        names = _unique([each.reference for each in merged])
        out: dict[str, Any] = {}
        if ancestor is not None:
            out["base"] = self._reference(ancestor, ("base",), ("base_model",))
        out["models"] = {
            names[each.reference]: self._reference(each.reference, ("models", names[each.reference]), each.place)
            for each in merged
        }
        if part.sources[0].span is not None:
            out["slices"] = [self._slice(part, names, ancestor)]
            self._mark(("slices", 0), part.place)
        own = {names[each.reference]: each.own for each in merged}
        reader = SettingsReader(self.findings, self.method, target, self._mark)
        bases = [each.own for each in part.sources if each.reference == ancestor]
        reader.tell_idle(list(own.values()), bases, part.scopes)
        read = reader.read(own, part.scopes, ("merge",))
        overrides = {"overrides": list(read.overrides)} if read.overrides else {}
        out["merge"] = {"method": target.method, **target.constants, **target.settle(read.values), **overrides}
        return out | self._tokenizer(names, base, ancestor)

    def _check_base(self, target: Counterpart, part: OutputSlice) -> None:
        """In slices, mergekit wants the base among the models."""
        listed = [each.reference for each in part.sources]
        span = part.sources[0].span
        if span is None or part.base is None or part.base in listed or not self._uses_base(target):
            return
        what = f"the base_model {part.base} is none of the models of this slice, which are {', '.join(listed)}"
        add = f"add - {{model: {part.base}, layer_range: {list(span)}}}"
        fix = f"write base_model: {listed[0]}, or {add}" if target.base == "member" else add
        self.findings.problem(part.place, what, fix)

    def _check_count(self, target: Counterpart, merged: Sequence[Source], part: OutputSlice) -> None:
        kind = registry()[target.method]
        names = [each.reference for each in merged]
        if kind.max_models is not None and len(names) > kind.max_models:
            fix = f"leave {len(names) - kind.max_models} out"
            fix += f", or write base_model: {names[1]}" if self._uses_base(target) and target.base == "member" else ""
            what = f"{self.method} takes {kind.max_models} models, and here are {', '.join(names)}"
            self.findings.problem(part.place, what, fix)

    def _uses_base(self, target: Counterpart) -> bool:
        """Whether the method asks which model is the base."""
        return target.base == "ancestor" or target.method == "slerp"

    def _ordered(self, part: OutputSlice, base: str | None, ancestor: str | None) -> list[Source]:
        """The models to merge: without the ancestor, or with the base in front."""
        others = [each for each in part.sources if each.reference != base]
        listed = [each for each in part.sources if each.reference == base]
        if base is None or base == ancestor:
            return others
        if part.sources[0].span is not None:
            return [*listed, *others]
        return [*(listed or [Source(base, Scope({}, ("base_model",)), ("base_model",))]), *others]

    def _slice(self, part: OutputSlice, names: Mapping[str, str], ancestor: str | None) -> dict[str, Any]:
        names = {**names, **({ancestor: "base"} if ancestor else {})}
        return {names[each.reference]: list(each.span or ()) for each in part.sources}

    def _reference(self, reference: str, place: Place, origin: Place) -> Any:
        self._mark(place, origin)
        source, plus, adapter = reference.partition("+")
        if not plus or is_there(reference):
            return reference
        return {"source": source, "adapters": [adapter]}

    def _storage(self) -> dict[str, Any]:
        """`compute` and `output`."""
        names = {k: str(self.data[k]).removeprefix("torch.") for k in ("dtype", "out_dtype") if self.data.get(k)}
        out: dict[str, Any] = {"compute": {"dtype": "float64"}} if names.get("dtype") == "float64" else {}
        key = "out_dtype" if "out_dtype" in names else "dtype"
        if key in names:
            if names[key] not in _STORED:
                fix = suggestion(names[key], _STORED) or f"write out_dtype: {_STORED[1]}"
                self.findings.problem((key,), f"results cannot be stored as {names[key]}", fix)
            out["output"] = {"dtype": names[key]}
        return out

    def _tokenizer(self, names: Mapping[str, str], base: str | None, ancestor: str | None) -> dict[str, Any]:
        wanted = self.data.get("tokenizer_source")
        for key in ("tokenizer", "chat_template"):
            if self.data.get(key):
                self.findings.problem((key,), f"`{key}` is not supported yet", "remove it")
        if wanted is None:
            return {}
        known = {**names, **({ancestor: "base"} if ancestor else {})}
        wanted = base if wanted == "base" else wanted
        if not isinstance(wanted, str) or wanted not in known:
            what = f"tokenizer_source {self.data['tokenizer_source']!r} is not supported"
            self.findings.problem(("tokenizer_source",), what, "write `base`, or the model whose tokenizer to take")
            return {}
        return {"tokenizer": {"source": known[wanted]}}


def _unique(references: Sequence[str]) -> dict[str, str]:
    """A name for each model: the last part of its path, numbered where two are alike."""
    names: dict[str, str] = {}
    for reference in references:
        stem = Path(reference.partition("+")[0].partition("@")[0]).name.removesuffix(".safetensors") or "model"
        stem = f"{stem}-model" if stem in ("base", "gradient") else stem
        copies = sum(name == stem or name.startswith(f"{stem}-") for name in names.values())
        names.setdefault(reference, f"{stem}-{copies + 1}" if stem in names.values() else stem)
    return names


def is_there(reference: str) -> bool:
    """Whether a model is a file or folder here."""
    try:
        return expanded(reference).exists()
    except OSError:  # too long for a path
        return False
