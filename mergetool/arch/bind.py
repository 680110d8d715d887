"""Names meet forms: which entry of a family file describes a tensor, and which spaces that brings to life."""

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mergetool.arch.language import ArchFamily, Axis, SpaceRule, Term, fill, parse_axes, pattern
from mergetool.errors import PlanError

Shapes = Mapping[str, tuple[int, ...]]
Holes = Mapping[str, int]


@dataclass(frozen=True)
class Bound:
    """A tensor whose form is known: its axes with every hole filled."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    matched: bool


@dataclass(frozen=True)
class Instance:
    """A space whose holes are filled."""

    rule: SpaceRule
    holes: Holes
    order: int

    @property
    def within(self) -> str | None:
        """The name of the outer space."""
        return fill(self.rule.within, self.holes) if self.rule.within else None


def covers(family: ArchFamily, shapes: Shapes) -> bool:
    """Whether the family requires something, finds it all, and describes every tensor that has an axis."""
    if not family.requires:
        return False
    for form in family.requires:
        required = re.compile(any_prefix(family) + pattern(form).pattern)
        if not any(required.fullmatch(name) for name in shapes):
            return False
    return not any(shape and _find(family, name) is None for name, shape in shapes.items())


def bind(family_name: str, family: ArchFamily, name: str, shape: tuple[int, ...]) -> Bound:
    """The tensor with the axes that its entry gives it. Raises PlanError if there is none, or their number differs."""
    entry = _find(family, name)
    if entry is None and shape:
        raise PlanError(
            f"no entry describes the tensor {name}",
            where=f"architecture {family_name}",
            fix=f"write a file with `extends: {family_name}` and an entry for it, and name it under `architecture:`",
        )
    if entry is None or entry[0] == "fixed" or not shape:
        return Bound(name, shape, tuple(((Term(),),) for _ in shape), False)
    text, holes, matched = entry
    axes = parse_axes(text)
    if len(axes) != len(shape):
        raise PlanError(
            f"the tensor has {len(shape)} axes {shape}, the architecture describes {len(axes)}: {text!r}",
            where=f"architecture {family_name}: {name}",
        )
    return Bound(name, shape, tuple(_filled(axis, holes) for axis in axes), matched)


def instances_of(family: ArchFamily, bound: list[Bound]) -> dict[str, Instance]:
    """Every space that occurs, in the order of the file, then of its numbers."""
    instances: dict[str, Instance] = {}
    terms = (term for tensor in bound for axis in tensor.axes for segment in axis for term in segment)
    pending = [term.space for term in terms if term.space is not None]
    while pending:
        name = pending.pop()
        if name in instances:
            continue
        instance = instance_of(family, name)
        assert instance is not None, "layouts name declared spaces only"
        instances[name] = instance
        if instance.within:
            pending.append(instance.within)
    return dict(sorted(instances.items(), key=lambda item: (item[1].order, tuple(item[1].holes.values()), item[0])))


def instance_of(family: ArchFamily, name: str) -> Instance | None:
    """The space of this name, if the family declares it."""
    for order, (form, rule) in enumerate(family.spaces.items()):
        holes = holes_of(form, name)
        if holes is not None:
            return Instance(rule, holes, order)
    return None


def holes_of(form: str, name: str) -> dict[str, int] | None:
    """What fills the holes of the form to give `name`; None if nothing does."""
    match = pattern(form).fullmatch(name)
    return None if match is None else {hole: int(number) for hole, number in match.groupdict().items()}


def architectures(config: Mapping[str, Any]) -> list[str]:
    """The names that config.json gives to the network (transformers: `architectures`, timm: `architecture`)."""
    listed = config.get("architectures")
    named = [*(listed if isinstance(listed, list) else []), config.get("architecture")]
    return [name for name in named if isinstance(name, str)]


def variant_sizes(family: ArchFamily, config: Mapping[str, Any]) -> dict[str, int]:
    """What the family knows of a network of this name that config.json does not say."""
    for glob, sizes in family.variants.items():
        if any(fnmatch.fnmatchcase(name, glob) for name in architectures(config)):
            return sizes
    return {}


def any_prefix(family: ArchFamily) -> str:
    """A regular expression for whatever may stand before a name."""
    return "(?:" + "|".join(re.escape(prefix) for prefix in family.prefixes) + ")"


def _find(family: ArchFamily, name: str) -> tuple[str, dict[str, int], bool] | None:
    """The layouts written for a tensor, the holes of its form, and whether it is matched."""
    for forms, matched in ((family.tensors, True), (family.buffers, False)):
        for form, axes in forms.items():
            match = re.fullmatch(any_prefix(family) + pattern(form).pattern, name)
            if match:
                return axes, {hole: int(number) for hole, number in match.groupdict().items()}, matched
    if any(fnmatch.fnmatchcase(name, glob) for glob in family.fixed):
        return "fixed", {}, False
    return None


def _filled(axis: Axis, holes: Holes) -> Axis:
    return tuple(
        tuple(replace(term, space=fill(term.space, holes)) if term.space else term for term in segment)
        for segment in axis
    )
