"""Group elements as index vectors: compose, invert, and act on tensors by gathers alone.

An element P of the symmetry group of a network holds, for every movable space, an index vector p and, where the
symmetry has signs, a sign vector s. It acts on a vector over that space by `(P x)[a] = s[a] * x[p[a]]`, and on a tensor
by acting on every axis: for a weight with rows over r and columns over c, `P_r W P_c^T`. A space nested in an outer
one has one index vector per outer coordinate, so head h of the result is head p[h] of the input, its channels
shuffled by row h of the inner index: `(P x)[h, j] = x[p[h], q[h, j]]`. This is the wreath product, written as a gather.

Convention of the whole house: **P_i maps universe coordinates to the coordinates of model i.** The universe image of
a model's weights is therefore `P_i.inverse()` applied to them, and the map from model j to model i is
`P_i @ P_j.inverse()`. Cycles of such maps compose to the identity exactly, in integers.

Reference: Crisostomi et al., C2M3, NeurIPS 2024, https://arxiv.org/abs/2405.17897, section 3 (the factorisation through
the universe). Differs from the paper: nested and signed groups beside plain permutations.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Self

import torch
from torch import Tensor

from mergetool.kernels.spaces import Factor, Layout, Segment, Space, ancestors, length

SIGN_SUFFIX = ":sign"


@dataclass(frozen=True, eq=False)
class Element:
    """One element of the direct product of the groups over `spaces`.

    `index[name]`: int64, shape (*sizes of the outer spaces, size), each row a permutation of range(size).
    `sign[name]`: int8 of +1 and -1, same shape; present for the symmetries "signed" and "flip".
    A space absent from `index` is left alone (fixed spaces always are), as is the sign of one absent from `sign`.
    """

    spaces: Mapping[str, Space]
    index: Mapping[str, Tensor]
    sign: Mapping[str, Tensor]

    @classmethod
    def identity(cls, spaces: Mapping[str, Space]) -> Self:
        """The element that leaves everything where it is."""
        return cls(spaces, {}, {})

    @classmethod
    def random(cls, spaces: Mapping[str, Space], generator: torch.Generator) -> Self:
        """A uniformly random element, drawn from `generator` (on the CPU) in the order of `spaces`."""
        index: dict[str, Tensor] = {}
        sign: dict[str, Tensor] = {}
        for name, space in spaces.items():
            if space.symmetry == "fixed":
                continue
            shape = element_shape(spaces, name)
            rows = [torch.randperm(space.size, generator=generator) for _ in range(prod(shape[:-1]))]
            index[name] = torch.stack(rows).reshape(shape)
            if space.symmetry != "permutation":
                width = 1 if space.symmetry == "flip" else space.size
                bits = torch.randint(0, 2, (*shape[:-1], width), generator=generator, dtype=torch.int8)
                sign[name] = (1 - 2 * bits).expand(shape).contiguous()
        return cls(spaces, index, sign)

    def __matmul__(self, other: "Element") -> "Element":
        """The element that acts like `other` and then `self`: `(P @ Q).apply(x) == P.apply(Q.apply(x))`."""
        index: dict[str, Tensor] = {}
        sign: dict[str, Tensor] = {}
        for name in self._movable():
            shape = element_shape(self.spaces, name)
            flat = self._flat_source(name)
            index[name] = other._index(name).reshape(-1)[flat].reshape(shape)
            if self._has_sign(name) or other._has_sign(name):
                carried = other._sign(name).reshape(-1)[flat].reshape(shape)
                sign[name] = self._sign(name) * carried
        return Element(self.spaces, index, sign)

    def inverse(self) -> "Element":
        """The element that undoes this one."""
        index: dict[str, Tensor] = {}
        sign: dict[str, Tensor] = {}
        for name in self._movable():
            shape = element_shape(self.spaces, name)
            flat = self._flat_source(name)
            here = torch.arange(shape[-1]).expand(shape).reshape(-1)
            index[name] = torch.empty_like(here).index_copy_(0, flat, here).reshape(shape)
            if self._has_sign(name):
                signs = self._sign(name).reshape(-1)
                sign[name] = torch.empty_like(signs).index_copy_(0, flat, signs).reshape(shape)
        return Element(self.spaces, index, sign)

    def along(self, layout: Layout) -> tuple[Tensor | None, Tensor | None]:
        """Index vector (int64) and sign vector (int8) of a whole axis of this layout, both (length of the axis,).

        `None` instead of an index vector that is the identity, or of signs that are all +1.
        """
        indices: list[Tensor] = []
        signs: list[Tensor] = []
        start = 0
        for segment in layout:
            index, sign = self._segment(segment)
            indices.append(index + start)
            signs.append(sign)
            start += index.numel()
        index, sign = torch.cat(indices), torch.cat(signs)
        moved = not torch.equal(index, torch.arange(start))
        return (index if moved else None), (sign if bool((sign < 0).any()) else None)

    def apply(self, x: Tensor, layouts: tuple[Layout, ...]) -> Tensor:
        """Act on every axis of `x`, whose axes have these layouts. `x` itself is returned where nothing moves.

        Raises ValueError if the number of axes or the length of one disagrees.
        """
        if x.ndim != len(layouts):
            raise ValueError(f"tensor has {x.ndim} axes {tuple(x.shape)}, the layout describes {len(layouts)}")
        for axis, layout in enumerate(layouts):
            x = self.apply_axis(x, axis, layout)
        return x

    def apply_axis(self, x: Tensor, axis: int, layout: Layout) -> Tensor:
        """Act on one axis of `x`. Same dtype and device. Raises ValueError if its length disagrees with the layout."""
        if x.shape[axis] != length(layout):
            raise ValueError(f"axis {axis} has length {x.shape[axis]}, the layout describes {length(layout)}")
        index, sign = self.along(layout)
        if index is not None:
            x = x.index_select(axis, index.to(x.device))
        if sign is not None:
            x = x * sign.to(x).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
        return x

    def only(self, names: set[str]) -> "Element":
        """The same element on the spaces in `names`, the identity elsewhere."""
        index = {name: value for name, value in self.index.items() if name in names}
        return Element(self.spaces, index, {name: value for name, value in self.sign.items() if name in names})

    def equals(self, other: "Element") -> bool:
        """Whether both act alike, bit for bit."""
        return all(
            torch.equal(self._index(name), other._index(name)) and torch.equal(self._sign(name), other._sign(name))
            for name in self._movable()
        )

    def pack(self) -> dict[str, Tensor]:
        """As plain int32 arrays, ready for a .safetensors file: `name` (index) and `name:sign`."""
        arrays = {name: value.to(torch.int32) for name, value in self.index.items()}
        return arrays | {name + SIGN_SUFFIX: value.to(torch.int32) for name, value in self.sign.items()}

    @classmethod
    def unpack(cls, spaces: Mapping[str, Space], arrays: Mapping[str, Tensor]) -> Self:
        """Read back what `pack` wrote. Raises ValueError for arrays that are no element of these spaces."""
        index = {name: array.to(torch.int64) for name, array in arrays.items() if SIGN_SUFFIX not in name}
        sign = {
            name.removesuffix(SIGN_SUFFIX): array.to(torch.int8)
            for name, array in arrays.items()
            if name.endswith(SIGN_SUFFIX)
        }
        element = cls(spaces, index, sign)
        check_element(element)
        return element

    def _movable(self) -> list[str]:
        return [name for name, space in self.spaces.items() if space.symmetry != "fixed"]

    def _has_sign(self, name: str) -> bool:
        return name in self.sign or self.spaces[name].symmetry in ("signed", "flip")

    def _index(self, name: str) -> Tensor:
        if name in self.index:
            return self.index[name]
        shape = element_shape(self.spaces, name)
        return torch.arange(shape[-1]).expand(shape)

    def _sign(self, name: str) -> Tensor:
        if name in self.sign:
            return self.sign[name]
        return torch.ones(element_shape(self.spaces, name), dtype=torch.int8)

    def _flat_source(self, name: str) -> Tensor:
        """For every coordinate (outer..., j) of the space in row-major order, the flat coordinate it is read from."""
        chain = (*ancestors(self.spaces, name), name)
        return self._segment(tuple(Factor(self.spaces[space].size, space) for space in chain))[0]

    def _segment(self, segment: Segment) -> tuple[Tensor, Tensor]:
        """Flat source index and sign of a segment, both (product of the factor sizes,)."""
        sizes = [factor.size for factor in segment]
        grids = torch.meshgrid(*[torch.arange(size) for size in sizes], indexing="ij")
        position = {factor.space: k for k, factor in enumerate(segment) if factor.space is not None}
        flat = torch.zeros(sizes, dtype=torch.int64)
        sign = torch.ones(sizes, dtype=torch.int8)
        for k, factor in enumerate(segment):
            source = grids[k]
            if factor.space is not None and factor.space in self.index:
                outer = ancestors(self.spaces, factor.space)
                at = (*(grids[position[name]] for name in outer), grids[k])
                source = self.index[factor.space][at]
                if factor.signed and factor.space in self.sign:
                    sign = sign * self.sign[factor.space][at]
            flat = flat * factor.size + source
        return flat.reshape(-1), sign.reshape(-1)


def element_shape(spaces: Mapping[str, Space], name: str) -> tuple[int, ...]:
    """Shape of the index array of a space: the sizes of its outer spaces, then its own."""
    return tuple(spaces[outer].size for outer in (*ancestors(spaces, name), name))


def check_element(element: Element) -> None:
    """Raise ValueError unless every index row is a permutation and every sign fits its space's symmetry."""
    for name in {*element.index, *element.sign}:
        if name not in element.spaces or element.spaces[name].symmetry == "fixed":
            raise ValueError(f"{name!r} is not a movable space of this network")
    for name, index in element.index.items():
        shape = element_shape(element.spaces, name)
        if tuple(index.shape) != shape:
            raise ValueError(f"index of {name!r} is {tuple(index.shape)}, the space wants {shape}")
        if not torch.equal(index.sort(dim=-1).values, torch.arange(shape[-1]).expand(shape)):
            raise ValueError(f"index of {name!r} is not a permutation of range({shape[-1]})")
    for name, sign in element.sign.items():
        symmetry = element.spaces[name].symmetry
        if symmetry == "permutation":
            raise ValueError(f"space {name!r} has no signs")
        if tuple(sign.shape) != element_shape(element.spaces, name) or not bool((sign.abs() == 1).all()):
            raise ValueError(f"signs of {name!r} must be +1 or -1, one per coordinate")
        if symmetry == "flip" and not bool((sign == sign[..., :1]).all()):
            raise ValueError(f"signs of {name!r} must all be equal: only the whole space may flip")
