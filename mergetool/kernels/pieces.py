"""Pieces: the terms of the alignment objective, cut from tensors along the layouts of their axes.

Tensors come in many shapes: a fused qkv has three segments on one axis, a dense layer after a flatten has pixels
inside its columns, a convolution carries a kernel along. For alignment all that matters is which axes move. A *piece*
is a part of a tensor in which at most two axes move, seen as (rows, columns, rest). How an axis moves is its *face*:
the factors by which it is laid out over spaces. Everything fixed goes to the rest and is summed over.

    Llama q_proj  rows (kv q 128), columns (residual)     one piece: face (kv q), face (residual), rest 128
    timm qkv      rows (head qk)+(head qk)+(head vo)       three pieces, two of them with the same faces
    embedding     (vocab, residual)                        one piece: face (residual), no columns, rest vocab
                  (or several, of 4096 rows each)

Faces that share a space move together: they form one *family*, the unknown of one assignment problem per model.

Reference: the C2M3 specification, sections 1.1 and 4.2.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TypeAlias

from torch import Tensor

from mergetool.kernels.spaces import Factor, Layout, Segment, Space, ancestors, length

Face: TypeAlias = Segment  # factors of spaces only

LONGEST = 4096  # indices of a fixed axis that one piece spans: an embedding need not be handled in one go


@dataclass(frozen=True)
class Piece:
    """Part of a tensor, as (rows, columns, rest); `faces` says how rows and columns move (one or two faces)."""

    tensor: str
    narrows: tuple[tuple[int, int, int], ...]  # (axis, start, length) of the segments chosen
    factors: tuple[int, ...]  # sizes of all factors of all axes, in order
    order: tuple[int, ...]  # those of the rows, those of the columns, the others
    faces: tuple[Face, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(rows, columns, rest); columns is 1 where only one axis moves."""
        rows = face_size(self.faces[0])
        columns = face_size(self.faces[1]) if len(self.faces) == 2 else 1
        return rows, columns, prod(self.factors) // (rows * columns)

    def view(self, tensor: Tensor) -> Tensor:
        """The piece of `tensor`, in the shape `shape`. A view where strides allow one."""
        for axis, start, size in self.narrows:
            tensor = tensor.narrow(axis, start, size)
        return tensor.reshape(self.factors).permute(self.order).reshape(self.shape)


@dataclass(frozen=True)
class FaceFamily:
    """Faces that move together, and where they occur: `places` are (number of the piece, 0 rows | 1 columns)."""

    spaces: tuple[str, ...]
    places: tuple[tuple[int, int], ...]


def face_size(face: Face) -> int:
    """Length of an axis with this face."""
    return prod(factor.size for factor in face)


def cut(spaces: Mapping[str, Space], layouts: Mapping[str, Sequence[Layout]]) -> tuple[Piece, ...]:
    """The pieces of the tensors `name -> layout of each axis`, in their order; what nothing moves is left out.

    Raises ValueError for a tensor of which more than two axes move.
    """
    return tuple(
        piece
        for tensor, axes in layouts.items()
        for piece in (_piece(spaces, tensor, axes, choice) for choice in _choices(spaces, axes))
        if piece is not None
    )


def families(spaces: Mapping[str, Space], pieces: Sequence[Piece]) -> tuple[FaceFamily, ...]:
    """The families of these pieces, in the order of their first space."""
    faces = {face for piece in pieces for face in piece.faces}
    linked = [{factor.space for factor in face if factor.space is not None} for face in faces]
    grouped: list[FaceFamily] = []
    for name in spaces:
        if any(name in family.spaces for family in grouped) or not any(name in link for link in linked):
            continue
        members = _connected(name, linked)
        places = tuple(
            (number, side)
            for number, piece in enumerate(pieces)
            for side, face in enumerate(piece.faces)
            if face[0].space in members
        )
        grouped.append(FaceFamily(tuple(space for space in spaces if space in members), places))
    return tuple(grouped)


def _connected(name: str, linked: Sequence[set[str]]) -> set[str]:
    members = {name}
    while True:
        grown = members.union(*(link for link in linked if link & members))
        if grown == members:
            return members
        members = grown


def _choices(spaces: Mapping[str, Space], axes: Sequence[Layout]) -> Iterator[tuple[tuple[int, Segment], ...]]:
    """Every way to take one segment, with its start, from each axis. Long fixed segments are taken in parts."""
    located: list[list[tuple[int, Segment]]] = []
    for layout in axes:
        start, segments = 0, []
        for segment in layout:
            size = face_size(segment)
            parts = [(start, segment)]
            if not any(_moves(spaces, factor, segment) for factor in segment):
                parts = [(start + at, (Factor(min(LONGEST, size - at)),)) for at in range(0, size, LONGEST)]
            segments += parts
            start += size
        located.append(segments)
    return product(*located)


def _piece(
    spaces: Mapping[str, Space],
    tensor: str,
    axes: Sequence[Layout],
    choice: tuple[tuple[int, Segment], ...],
) -> Piece | None:
    """The piece made of one segment per axis, or None where none of them moves."""
    factors = [factor for _, segment in choice for factor in segment]
    faces: list[Face] = []
    moving: list[int] = []
    offset = 0
    for _, segment in choice:
        inside = [k for k, factor in enumerate(segment) if _moves(spaces, factor, segment)]
        if inside:
            faces.append(tuple(_own_sign(spaces, segment[k]) for k in inside))
            moving.extend(offset + k for k in inside)
        offset += len(segment)
    if not faces:
        return None
    if len(faces) > 2:
        raise ValueError(f"{len(faces)} axes of {tensor} can be permuted; alignment handles two")
    return Piece(
        tensor,
        tuple(
            (axis, start, prod(factor.size for factor in segment))
            for axis, (start, segment) in enumerate(choice)
            if face_size(segment) < length(axes[axis])
        ),
        tuple(factor.size for factor in factors),
        (*moving, *(k for k in range(len(factors)) if k not in moving)),
        tuple(faces),
    )


def _moves(spaces: Mapping[str, Space], factor: Factor, segment: Segment) -> bool:
    """Whether a factor belongs to a face: it can be permuted, or something within it can."""
    if factor.space is None:
        return False
    movable = [f.space for f in segment if f.space is not None and spaces[f.space].symmetry != "fixed"]
    return factor.space in movable or any(factor.space in ancestors(spaces, name) for name in movable)


def _own_sign(spaces: Mapping[str, Space], factor: Factor) -> Factor:
    """The factor with `signed` true only where signs act, so that equal motions are equal faces."""
    assert factor.space is not None
    signed = factor.signed and spaces[factor.space].symmetry in ("signed", "flip")
    return Factor(factor.size, factor.space, signed)
