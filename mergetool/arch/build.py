"""A family meets a checkpoint: forms and shapes become an `ArchSpec`.

Names are matched to forms (the first that fits wins), holes are filled, and sizes are solved for: those that
config.json tells first, then any axis on which a single unknown is left, again and again. Last, spaces that are one
are joined, and every axis is checked against its layout.
"""

import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from mergetool.arch.bind import (
    Bound,
    Holes,
    Instance,
    Shapes,
    any_prefix,
    architectures,
    bind,
    holes_of,
    instance_of,
    instances_of,
    variant_sizes,
)
from mergetool.arch.depth import block_depths
from mergetool.arch.language import ArchFamily, Identity, Term, fill, pattern
from mergetool.arch.sizes import Sizes
from mergetool.arch.spec import ArchSpec, TensorAxes, check
from mergetool.errors import PlanError, at
from mergetool.kernels.spaces import Factor, Layout, Segment, Space


def build(name: str, family: ArchFamily, shapes: Shapes, config: Mapping[str, Any]) -> ArchSpec:
    """The spec of a checkpoint with these shapes and this config.json (`{}` if there is none).

    Raises PlanError for a tensor that the family does not describe, a size that nothing tells, and any axis that
    disagrees with its layout.
    """
    bound = [bind(name, family, tensor, tuple(shape)) for tensor, shape in sorted(shapes.items())]
    instances = instances_of(family, bound)
    sizes = Sizes(name, instances, {**config, **variant_sizes(family, config), **family.sizes}).solve(bound)

    def applies(rule: Identity, holes: Holes) -> bool:
        told = any(fnmatch.fnmatchcase(n, glob) for n in architectures(config) for glob in rule.architectures)
        there = not rule.when or _present(family, rule.when, holes, shapes)
        return (told or not rule.architectures) and there and not _present(family, rule.unless, holes, shapes)

    with at(f"architecture {name}"):
        factors = _joined(family, instances, sizes, applies)
    spaces = _spaces(instances, sizes, factors)
    depths = block_depths(shapes, [re.compile(any_prefix(family) + pattern(b).pattern) for b in family.layers])
    tied, aliases = _tied(family, shapes, config)
    tensors = {
        tensor.name: TensorAxes(
            tensor.shape,
            tuple(_layout(tensor, axis, sizes, factors) for axis in range(len(tensor.shape))),
            matched=tensor.matched and tensor.name not in aliases,
            depth=depths[tensor.name],
        )
        for tensor in bound
    }
    return check(ArchSpec(name, spaces, tensors, tied))


def _joined(
    family: ArchFamily,
    instances: dict[str, Instance],
    sizes: dict[str, int],
    applies: Callable[[Identity, Holes], bool],
) -> dict[str, Layout]:
    """For every space the layout that stands for it: itself, another it is the same as, or that one padded.

    What padding adds, and targets that no tensor names, are added to `instances` and `sizes`.
    """
    layouts: dict[str, Layout] = {space: ((Factor(sizes[space], space),),) for space in instances}
    for rule in family.identities:
        for space in list(instances):
            holes = holes_of(rule.space, space)
            if holes is None or layouts[space] != ((Factor(sizes[space], space),),) or not applies(rule, holes):
                continue
            target = fill(rule.same, holes)
            if target not in instances:
                declared = instance_of(family, target)
                if declared is None:
                    continue
                instances[target], sizes[target] = declared, sizes[space]
                layouts[target] = ((Factor(sizes[space], target),),)
            layouts[space] = _widened(rule, space, target, (instances, sizes, layouts))
    return layouts


def _widened(
    rule: Identity,
    space: str,
    target: str,
    known: tuple[dict[str, Instance], dict[str, int], dict[str, Layout]],
) -> Layout:
    """The layout of `target`, with new channels around it if `space` is wider and the rule says `pad`."""
    instances, sizes, layouts = known
    wider = sizes[space] - sizes[target]
    if wider < 0 or (wider and rule.pad is None):
        raise PlanError(f"{space!r} is said to be {target!r}, but their sizes are {sizes[space]} and {sizes[target]}")
    front = wider // 2 if rule.pad == "centre" else 0
    for new, width in ((f"{space}.front", front), (f"{space}.back", wider - front)):
        if width:
            instances[new], sizes[new], layouts[new] = instances[space], width, ((Factor(width, new),),)
    return (*layouts.get(f"{space}.front", ()), *layouts[target], *layouts.get(f"{space}.back", ()))


def _present(family: ArchFamily, forms: list[str], holes: Holes, shapes: Shapes) -> bool:
    """Whether one of the tensors is there."""
    names = [fill(form, holes) for form in forms]
    return any(prefix + name in shapes for name in names for prefix in family.prefixes)


def _spaces(
    instances: Mapping[str, Instance], sizes: Mapping[str, int], layouts: Mapping[str, Layout]
) -> dict[str, Space]:
    """The spaces that are left after joining, as data."""
    used = {factor.space for layout in layouts.values() for segment in layout for factor in segment}
    return {
        name: Space(name, sizes[name], instance.rule.symmetry, instance.within)
        for name, instance in instances.items()
        if name in used
    }


def _layout(tensor: Bound, axis: int, sizes: Mapping[str, int], layouts: Mapping[str, Layout]) -> Layout:
    """The layout of one axis, `_` given the size that is left and joined spaces written out."""
    segments: list[Segment] = []
    for segment in tensor.axes[axis]:
        known = prod(sizes[t.space] if t.space else t.size or 1 for t in segment)
        others = sum(prod(sizes[t.space] if t.space else t.size or 1 for t in s) for s in tensor.axes[axis]) - known
        rest = max((tensor.shape[axis] - others) // known, 1)
        segments.extend(_written_out(segment, rest, layouts, f"{tensor.name}, axis {axis}"))
    return tuple(segments)


def _written_out(segment: tuple[Term, ...], rest: int, layouts: Mapping[str, Layout], where: str) -> list[Segment]:
    expanded: list[Segment] = [()]
    for position, term in enumerate(segment):
        if term.space is None:
            choices: Layout = ((Factor(term.size or rest),),)
        else:
            choices = tuple(
                tuple(replace(factor, signed=factor.signed and term.signed) for factor in part)
                for part in layouts[term.space]
            )
        if len(choices) > 1 and position:
            raise PlanError(f"a padded space must be the first factor of its segment, {term.space!r} is not", where)
        expanded = [left + right for left in expanded for right in choices]
    return expanded


def _tied(
    family: ArchFamily, shapes: Shapes, config: Mapping[str, Any]
) -> tuple[tuple[tuple[str, ...], ...], set[str]]:
    """Groups of stored names that are one tensor, and those of them that need no matching of their own."""
    tied: list[tuple[str, ...]] = []
    for tie in family.tied:
        names = tuple(prefix + name for name in tie.names for prefix in family.prefixes if prefix + name in shapes)
        said = bool(config.get(tie.when, tie.default)) if tie.when else tie.default
        if said and len(names) > 1:
            tied.append(names)
    return tuple(tied), {name for names in tied for name in names[:-1]}
