"""What can be permuted in a network, and how tensor axes are built from it. Data only: imports no torch.

A *space* is a set of interchangeable coordinates: the units of one hidden layer, the heads of one attention
layer, the channels inside every head. An *axis* of a tensor is laid out over spaces: it is a concatenation of
segments, and a segment is a row-major product of factors, each a space or something fixed.

    rows of a fused timm qkv    (head qk) + (head qk) + (head vo)          three segments of two factors
    rows of a Llama q_proj      (kv q 128)                                 KV groups, heads in a group, fixed
    columns after a flatten     (channel 49)                               channels, 7 x 7 pixels

A space may live `within` another: then it has one group element per index of the outer space (head 0 shuffles its
channels in its own way). A space with everything nested in it is a *group*, the unit that one assignment oracle
solves. All kinds of group are made of this one idea:

    plain permutation S_n                    one space
    signed permutation B_n (RMSNorm)         one space, symmetry "signed"
    S_n x {+1, -1} (LayerNorm)               one space, symmetry "flip"
    attention (S_dh x S_dh) wr S_H           head; qk within head; vo within head
    grouped-query attention under RoPE       kv; q within kv; vo within kv           (qk is a fixed factor)
    grouped convolution, GroupNorm           outer; inner within outer

Reference: the C2M3 specification, sections 4.2 and 4.6 to 4.8; wreath products, any text on permutation groups.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias

Symmetry: TypeAlias = Literal["fixed", "permutation", "signed", "flip"]


@dataclass(frozen=True)
class Space:
    """A set of `size` coordinates and the group that acts on it.

    `symmetry`: "fixed" (only the identity: vocabulary, pixels, classes), "permutation", "signed" (a permutation and
    one sign per coordinate), "flip" (a permutation and one sign for all coordinates together).
    `within`: the name of the outer space; there is then one element per index of it (and of its own outer spaces).
    """

    name: str
    size: int
    symmetry: Symmetry = "permutation"
    within: str | None = None


@dataclass(frozen=True)
class Factor:
    """One factor of a segment: `size` coordinates of `space`, or of nothing in particular (`None`: fixed).

    `signed=False`: the axis is permuted by the space's element but its signs are not applied (the scale of a
    norm: gamma stays positive where the stream flips).
    """

    size: int
    space: str | None = None
    signed: bool = True


Segment: TypeAlias = tuple[Factor, ...]
Layout: TypeAlias = tuple[Segment, ...]  # of one axis


@dataclass(frozen=True)
class Incidence:
    """One place where a space meets a tensor: factor `position` of `segment` on `axis` of `tensor`.

    `start` is the first index of the segment on the axis. On the narrowed axis the space is the middle axis of the
    view (outer, size, inner), with `outer` and `inner` the products of the sizes of the factors before and after.
    """

    tensor: str
    axis: int
    segment: int
    position: int
    start: int
    outer: int
    size: int
    inner: int
    signed: bool


@dataclass(frozen=True)
class Group:
    """A root space and all that is nested in it, outer before inner: the unit of one assignment problem.

    `kind`: "permutation", "signed", "flip" (one space of that symmetry) or "nested" (more than one space).
    """

    name: str
    spaces: tuple[Space, ...]

    @property
    def kind(self) -> Literal["permutation", "signed", "flip", "nested"]:
        """Which oracle solves it."""
        if len(self.spaces) > 1:
            return "nested"
        symmetry = self.spaces[0].symmetry
        assert symmetry != "fixed", "a fixed space forms no group"
        return symmetry

    @property
    def size(self) -> int:
        """Number of coordinates of the root space."""
        return self.spaces[0].size


def length(layout: Layout) -> int:
    """Number of indices along an axis of this layout."""
    return sum(prod(factor.size for factor in segment) for segment in layout)


def ancestors(spaces: Mapping[str, Space], name: str) -> tuple[str, ...]:
    """The outer spaces of `name`, outermost first, without `name` itself.

    Raises ValueError for an unknown space or a circle.
    """
    chain: list[str] = []
    outer = spaces[name].within
    while outer is not None:
        if outer in chain or outer == name:
            raise ValueError(f"space {name!r} lies within itself: {' < '.join([name, *chain, outer])}")
        if outer not in spaces:
            raise ValueError(f"space {name!r} lies within {outer!r}, which does not exist")
        chain.append(outer)
        outer = spaces[outer].within
    return tuple(reversed(chain))


def check_layout(spaces: Mapping[str, Space], layout: Layout) -> None:
    """Raise ValueError unless every factor fits its space and stands beside the outer spaces it depends on."""
    for segment in layout:
        present = [factor.space for factor in segment if factor.space is not None]
        for factor in segment:
            if factor.space is None:
                continue
            if factor.space not in spaces:
                raise ValueError(f"unknown space {factor.space!r}")
            if factor.size != spaces[factor.space].size:
                raise ValueError(f"{factor.size} coordinates of {factor.space!r}, of size {spaces[factor.space].size}")
            if present.count(factor.space) > 1:
                raise ValueError(f"space {factor.space!r} occurs twice in one segment")
            for outer in ancestors(spaces, factor.space):
                if outer not in present:
                    raise ValueError(f"{factor.space!r} lies within {outer!r}, which is not in its segment")


def groups(spaces: Mapping[str, Space]) -> tuple[Group, ...]:
    """The groups of these spaces, in the order in which their roots are declared. Fixed spaces are left out.

    A movable space within a fixed one is the root of a group of its own, with one element per index of the
    fixed space.
    """
    roots: dict[str, list[Space]] = {}
    movable = {name: space for name, space in spaces.items() if space.symmetry != "fixed"}
    for name in sorted(movable, key=lambda name: len(ancestors(spaces, name))):
        chain = [outer for outer in ancestors(spaces, name) if outer in movable]
        roots.setdefault(chain[0] if chain else name, []).append(movable[name])
    return tuple(Group(name, tuple(roots[name])) for name in movable if name in roots)


def incidences(layouts: Mapping[str, Iterable[Layout]]) -> dict[str, tuple[Incidence, ...]]:
    """For each space, every place where it occurs in the tensors `name -> layout of each axis`."""
    by_space: dict[str, list[Incidence]] = {}
    for tensor, axes in layouts.items():
        for axis, layout in enumerate(axes):
            start = 0
            for number, segment in enumerate(layout):
                sizes = [factor.size for factor in segment]
                for position, factor in enumerate(segment):
                    if factor.space is not None:
                        outer, inner = prod(sizes[:position]), prod(sizes[position + 1 :])
                        where = Incidence(
                            tensor, axis, number, position, start, outer, factor.size, inner, factor.signed
                        )
                        by_space.setdefault(factor.space, []).append(where)
                start += prod(sizes)
    return {space: tuple(places) for space, places in by_space.items()}
