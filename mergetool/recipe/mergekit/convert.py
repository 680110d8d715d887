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
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from mergetool.errors import RecipeError
from mergetool.methods import registry
from mergetool.methods.base import Method
from mergetool.recipe.document import Document, Place
from mergetool.recipe.mergekit.counterparts import METHODS, Counterpart
from mergetool.recipe.mergekit.evolve import convert_evolve, is_evolve
from mergetool.recipe.mergekit.findings import Findings
from mergetool.recipe.mergekit.moe import convert_moe, is_moe
from mergetool.recipe.mergekit.reading import TOP_KEYS, OutputSlice, Reading
from mergetool.recipe.mergekit.renumbered import Renumbered
from mergetool.recipe.mergekit.roster import Roster
from mergetool.recipe.mergekit.settings import MethodSettings, SettingsReader
from mergetool.recipe.mergekit.stacking import stacked
from mergetool.recipe.mergekit.vocabulary import Words
from mergetool.recipe.render import DTYPE_WORDS

_STORED = ("float32", "bfloat16", "float16")


def is_mergekit(data: Any) -> bool:
    """Whether parsed YAML is a mergekit recipe, or one of mergekit-evolve or mergekit-moe."""
    kinds = (is_evolve, is_moe, _lacks_method)
    return isinstance(data, dict) and ("merge_method" in data or any(kind(data) for kind in kinds))


def _lacks_method(data: Mapping[str, Any]) -> bool:
    """Whether only the method is missing: models as a list, or slices with sources."""
    listed = [data.get("models"), data.get("slices")]
    entries = [each[0] for each in listed if isinstance(each, list) and each and isinstance(each[0], dict)]
    return "merge" not in data and any("model" in each or "sources" in each for each in entries)


def convert(document: Document) -> Document:
    """Our recipe for a mergekit one. Places keep the lines of the original; paths are relative to the current folder.

    Raises RecipeError holding every problem found.
    """
    if is_evolve(document.data):
        return convert_evolve(document)
    if is_moe(document.data):
        return convert_moe(document)
    importer = _Importer(document)
    return importer.findings.converted(importer.convert(), importer.marks)


class _Importer:
    """One conversion: what was found, and where each of our values comes from."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.data: Mapping[str, Any] = document.data
        self.findings = Findings(document)
        self.marks: dict[Place, tuple[int, int]] = {(): document.marks.get((), (1, 1))}
        self.method = str(self.data.get("merge_method") or "")

    def convert(self) -> dict[str, Any]:
        target = self._counterpart()
        hints = dict.fromkeys(target.parameters if target else (), "write it inside `parameters`")
        hints["pad_to_multiple_of"] = "write it inside `tokenizer`"
        self.findings.stray(self.data, (), TOP_KEYS, hints)
        storage = self._storage()
        try:
            reading = Reading(self.findings, self.data)
            parts = reading.parts()
            return {**self._merged(target, reading, parts), **storage} if target else {}
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
        if not self.method:
            self.findings.problem((), "`merge_method` is required", f"add merge_method: one of {', '.join(METHODS)}")
        elif target is None or target.method not in registry():
            self.findings.problem(("merge_method",), *_unknown(self.method))
            return None
        else:
            self._mark(("merge",), ("merge_method",))
        return target

    def _merged(self, target: Counterpart, reading: Reading, parts: Sequence[OutputSlice]) -> dict[str, Any]:
        """Everything but how the result is stored."""
        roster = Roster(self.findings, self.method, target, parts)
        settings = self._settings(roster)
        words = Words(self.findings, self.data, reading, roster).sections()
        for key in words:
            self._mark((key,), (key,) if self.data.get(key) else ("tokenizer_source",))
        if self.findings.problems:
            return {}
        out: dict[str, Any] = {}
        for place, reference, origin in roster.sections():
            holder = out if len(place) == 1 else out.setdefault("models", {})
            holder[str(place[-1])] = reference
            self._mark(place, origin)
        sections = stacked(roster, settings)
        if len(roster.groups) == 1:
            self._check_numbers(sections["merge"], roster)
        return {**out, **sections, **words}

    def _check_numbers(self, merge: Mapping[str, Any], roster: Roster) -> None:
        """Numbers that cannot work together, as mergekit would say when it comes to them.

        Only those that hold where no filter matches: whether one does is not known yet.
        """
        names = [roster.names[each.reference] for each in roster.groups[0].merged]
        fields = {key: value for key, value in merge.items() if key != "overrides"}
        try:
            method = registry()[roster.target.method].model_validate(fields)
        except ValidationError:
            return  # which is told with all else that is wrong with the sections
        for problem in {method.problem(method.params(depth, names)) for depth in (0.0, 1.0)} - {None}:
            self.findings.problem(("merge_method",), str(problem), _mended(method, names))

    def _settings(self, roster: Roster) -> list[MethodSettings]:
        """Of each slice, its settings."""
        reader = SettingsReader(self.findings, self.method, roster.target, self._mark)
        of_slices, height = [], 0
        for index, group in enumerate(roster.groups):
            self._mark(("slices", index), group.part.place)
            reader.tell_idle(group)
            own = {roster.names[each.reference]: each.own for each in group.merged}
            numbers = {
                roster.names[each.reference]: Renumbered(each.span[0], height, group.length)
                for each in group.merged
                if each.span is not None
            }
            places = [("merge",), ("slices", index, "set")]
            of_slices.append(reader.read(own, group.part.scopes, places, numbers) if own else MethodSettings({}, []))
            height += group.length
        reader.tell_idle_of_all([scope for part in roster.parts for scope in part.scopes])
        return of_slices

    def _storage(self) -> dict[str, Any]:
        """`compute` and `output`."""
        names = {k: str(self.data[k]).removeprefix("torch.") for k in ("dtype", "out_dtype") if self.data.get(k)}
        out: dict[str, Any] = {"compute": {"dtype": "float64"}} if names.get("dtype") == "float64" else {}
        key = "out_dtype" if "out_dtype" in names else "dtype"
        if key in names:
            if names[key] not in _STORED:
                wanted = "out_dtype: float32" if names[key] == "float64" else f"{key}: bfloat16"
                meant = DTYPE_WORDS.get(names[key].lower())
                fix = f"write {key}: {meant}" if meant in _STORED else f"write {wanted}"
                self.findings.problem((key,), f"results cannot be stored as {names[key]}", fix)
            out["output"] = {"dtype": names[key]}
        return out


def _mended(method: Method, names: Sequence[str]) -> str:
    """How to change numbers that do not go together."""
    numbers = method.params(0.0, names)
    if hasattr(numbers, "epsilon"):
        most = min([min(each, 1 - each) for each in numbers.density if each < 1], default=0)
        return f"write epsilon: {round(most, 6)}, or less"
    return "add parameters: {normalize: false}" if getattr(method, "normalize", False) else "change these numbers"


def _unknown(name: str) -> tuple[str, str]:
    """What to say of a method that mergekit does not have either: a slip, or that of a fork."""
    what = f"mergekit has no method {name!r} (a fork of it may)"
    slip = get_close_matches(name.lower().replace("-", "_"), METHODS, n=1, cutoff=0.8)
    if slip:
        return what, f"did you mean {slip[0]!r}?"
    ours = name.lower().replace("_", "-")
    if ours in registry():
        return what, f"there is one of our own: mergetool init {ours} -o recipe.yaml"
    return what, f"choose one of {', '.join(METHODS)}, or one of our own: mergetool methods"
