"""Who is who in a mergekit recipe: which models are merged, which one is the base, and what they are called with us.

`base_model` is the common ancestor for methods of task vectors; it is the first model for slerp, and one more model for
methods that know no base (linear), where whole models are listed. Each slice may have a base of its own.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mergetool.methods import registry
from mergetool.recipe.document import Place
from mergetool.recipe.mergekit.counterparts import Counterpart
from mergetool.recipe.mergekit.findings import Findings
from mergetool.recipe.mergekit.parameters import Scope
from mergetool.recipe.mergekit.reading import OutputSlice, Source
from mergetool.recipe.schema import expanded
from mergetool.recipe.words import AUTO, TEMPLATES, UNION


@dataclass(frozen=True)
class SliceModels:
    """The models of one slice by their part in it."""

    part: OutputSlice
    merged: Sequence[Source]
    """In the order of the result; the base in front, where it is one of them."""
    ancestor: Source | None
    """The common ancestor; it has no layers of its own where whole models are merged."""

    @property
    def leader(self) -> Source:
        """The model that is there whatever is missing."""
        return (*self.merged, *([self.ancestor] if self.ancestor else []))[0]

    @property
    def length(self) -> int:
        """How many layers it makes."""
        start, end = self.leader.span or (0, 0)
        return end - start


class Roster:
    """The models of a recipe; what does not fit the method goes to `findings`."""

    def __init__(self, findings: Findings, mergekit_name: str, target: Counterpart, parts: Sequence[OutputSlice]):
        self.findings = findings
        self.name = mergekit_name
        self.target = target
        self.parts = parts

    @property
    def uses_base(self) -> bool:
        """Whether the method asks which model is the base."""
        return self.target.base != "member" or self.target.method == "slerp"

    @cached_property
    def groups(self) -> Sequence[SliceModels]:
        return [self._group(part) for part in self.parts]

    @property
    def whole(self) -> bool:
        """Whether whole models are merged, not layers of them."""
        return self.parts[0].sources[0].span is None

    def is_base_of_recipe(self, source: Source) -> bool:
        """Whether a slice's base is what `base` says."""
        return self.ancestor is not None and source.reference == self.ancestor.reference

    @cached_property
    def ancestor(self) -> Source | None:
        """The common ancestor of the recipe: that of the first slice that has one."""
        return next((group.ancestor for group in self.groups if group.ancestor is not None), None)

    @cached_property
    def models(self) -> Sequence[Source]:
        """Every model but the ancestor, in order, without its layers: merged ones, then other slices' bases."""
        sources = {source.reference: source for group in self.groups for source in group.merged}
        known = self.ancestor.reference if self.ancestor else None
        for group in self.groups:
            if group.ancestor is not None and group.ancestor.reference != known:
                sources.setdefault(group.ancestor.reference, group.ancestor)
        return list(sources.values())

    @cached_property
    def names(self) -> Mapping[str, str]:
        """Reference -> our name, for each of `models`."""
        names: dict[str, str] = {}
        for reference in (source.reference for source in self.models):
            parts = re.split(r"[/\\]+", reference.partition("+")[0].partition("@")[0].rstrip("/\\"))
            stem = parts[-1].removesuffix(".safetensors") or "model"
            stem = f"{stem}-model" if stem in _RESERVED else stem
            copies = sum(name == stem or name.startswith(f"{stem}-") for name in names.values())
            names[reference] = f"{stem}-{copies + 1}" if stem in names.values() else stem
        return names

    def called(self, reference: str) -> str | None:
        """What the vocabulary of a model is called with us, the ancestor's `base`."""
        known = {self.ancestor.reference: "base"} if self.ancestor else {}
        return (known | dict(self.names)).get(reference)

    def sections(self) -> Iterator[tuple[Place, Any, Place]]:
        """(our place, reference, place in the file) of the base and every model."""
        if self.ancestor is not None:
            yield ("base",), self._as_ours(self.ancestor), self.ancestor.place
        for source in self.models:
            yield ("models", self.names[source.reference]), self._as_ours(source), source.place

    def _as_ours(self, source: Source) -> Any:
        """A reference in our words; a folder that is here has no revisions, and mergekit asks it for none."""
        path, at, rest = source.reference.partition("@")
        revision, plus, adapter = rest.partition("+")
        if at and not is_there(source.reference) and is_there(path):
            self.findings.warn(source.place, f"{path} is a folder here, so the revision {revision} has no effect")
            return _as_ours(path + plus + adapter)
        return _as_ours(source.reference)

    def _group(self, part: OutputSlice) -> SliceModels:
        self._check_base(part)
        base, method = part.base, self.target
        others = [each for each in part.sources if each.reference != base]
        listed = [each for each in part.sources if each.reference == base]
        whole = part.sources[0].span is None
        if base is not None and not listed and (whole or method.base != "member"):
            listed = [Source(base, Scope({}, ("base_model",)), ("base_model",))]
        ancestor = listed[0] if listed and method.base != "member" else None
        group = SliceModels(part, [*([] if ancestor else listed), *others], ancestor)
        self._check_count(group)
        return group

    def _check_base(self, part: OutputSlice) -> None:
        """Methods that use a base need one; in slices, mergekit wants it among the models."""
        listed = [each.reference for each in part.sources]
        span = part.sources[0].span
        if part.base is None:
            if self.uses_base and self.target.base != "optional":
                self.findings.problem((), f"{self.name} needs a base model", f"add base_model: {listed[0]}")
        elif span is not None and part.base not in listed:
            what = f"the base_model {part.base} is none of the models of this slice, which are {', '.join(listed)}"
            add = f"add - {{model: {part.base}, layer_range: {list(span)}}}"
            if self.uses_base:
                fix = f"write base_model: {listed[0]}" if self.target.base == "member" and len(listed) > 1 else add
                self.findings.problem(part.place, what, fix)
            elif part is self.parts[0]:
                why = f"the base_model is merged with nothing: {self.name} takes no base"
                self.findings.warn(("base_model",), f"{why}, and other files come from {listed[0]}")

    def _check_count(self, group: SliceModels) -> None:
        kind = registry()[self.target.method]
        names = [each.reference for each in group.merged]
        copied = not names or (len(names) == 1 and not self.uses_base)
        least, most = kind.min_models, kind.max_models
        few, many = len(names) < least and (self.whole or not copied), most is not None and len(names) > most
        if not few and not many:
            return
        wanted = f"at least {least}" if most is None else most if many or most == least else f"{least} to {most}"
        noun = "model" if wanted in (1, "at least 1") else "models"
        what = f"{self.name} takes {wanted} {noun}, and here are {', '.join(names) or 'none'}"
        fix = f"leave {len(names) - most} out" if most is not None and many else "add one"
        if many and self.target.method == "slerp":
            fix += f", or write base_model: {names[1]}"
        self.findings.problem(group.part.place, what, fix)


_RESERVED = ("base", "gradient", "layers", "outside", UNION, AUTO, *TEMPLATES)
"""Words that mean something else where a model may be named."""


def _as_ours(reference: str) -> Any:
    source, plus, adapter = reference.partition("+")
    if not plus or is_there(reference):
        return reference
    return {"source": source, "adapters": [adapter]}


def is_there(reference: str) -> bool:
    """Whether a model is a file or folder here."""
    try:
        return expanded(reference).exists()
    except OSError:  # too long for a path
        return False
