"""Soft group elements: convex combinations of permutations, applied to weights by weighted gathers.

Frank-Wolfe moves inside the hull of the group. It never needs a dense matrix for that: after k steps its iterate is a
weighted list of at most k + 1 group elements, so a soft permutation of d rows is k index vectors and k weights, and
acting with it on a matrix is a gather of k rows per row. That is a few per cent of the cost of the matrix product
that follows, so images of weights are made afresh whenever they are needed: nothing beside the models is held in
memory, and no rounding error accumulates along the run.

Orientation: elements here map **model coordinates to universe coordinates**, `(Q x)[u] = s[u] x[q[u]]`; they are the
inverses of the P of the paper.

Reference: Crisostomi et al., C2M3, NeurIPS 2024, https://arxiv.org/abs/2405.17897, section 3.
Differs from the paper: iterates are lists of elements, the paper keeps dense matrices.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from mergetool.kernels.permute import Element
from mergetool.kernels.pieces import Face, face_size
from mergetool.kernels.spaces import Space

NEGLIGIBLE = 1e-12  # share of an iterate below which an element is dropped


@dataclass(frozen=True)
class Soft:
    """A convex combination of k elements of one model's group and, with share `mean`, of the mean of the whole group.

    `shares`: k numbers. `elements`: the k elements. `index[face]`: int64 (size of the face, k).
    `sign[face]`: int8 of the same shape, for the faces on which signs act.
    """

    shares: tuple[float, ...]
    elements: tuple[Element, ...]
    index: Mapping[Face, Tensor]
    sign: Mapping[Face, Tensor]
    mean: float = 0.0

    @classmethod
    def at(cls, element: Element, faces: Iterable[Face]) -> "Soft":
        """A single element."""
        index: dict[Face, Tensor] = {}
        sign: dict[Face, Tensor] = {}
        for face in faces:
            order, signs = element.along((face,))
            index[face] = (torch.arange(face_size(face)) if order is None else order)[:, None]
            if any(factor.signed for factor in face):
                ones = torch.ones(face_size(face), dtype=torch.int8)
                sign[face] = (ones if signs is None else signs)[:, None]
        return cls((1.0,), (element,), index, sign)

    @classmethod
    def middle(cls, faces: Iterable[Face]) -> "Soft":
        """The mean of the whole group: the barycentre of its hull."""
        index = {face: torch.empty((face_size(face), 0), dtype=torch.int64) for face in faces}
        sign = {face: index[face].to(torch.int8) for face in index if any(factor.signed for factor in face)}
        return cls((), (), index, sign, mean=1.0)

    @property
    def hard(self) -> bool:
        """Whether this is a single element."""
        return len(self.shares) == 1 and self.mean == 0

    def toward(self, other: "Soft", step: float) -> "Soft":
        """`(1 - step) * self + step * other`, without what has become negligible."""
        shares = [(1 - step) * share for share in self.shares] + [step * share for share in other.shares]
        kept = [k for k, share in enumerate(shares) if share > NEGLIGIBLE]
        elements = self.elements + other.elements
        return Soft(
            tuple(shares[k] for k in kept),
            tuple(elements[k] for k in kept),
            {f: torch.cat([index, other.index[f]], 1)[:, kept] for f, index in self.index.items()},
            {f: torch.cat([sign, other.sign[f]], 1)[:, kept] for f, sign in self.sign.items()},
            (1 - step) * self.mean + step * other.mean,
        )

    def matrix(self, face: Face) -> Tensor:
        """As a dense matrix (universe, model), float64, without the share of the mean (it favours no element)."""
        size = face_size(face)
        rows = torch.arange(size)[:, None].expand(-1, len(self.shares))
        values = torch.tensor(self.shares, dtype=torch.float64).expand(size, -1)
        if face in self.sign:
            values = values * self.sign[face]
        dense = torch.zeros(size, size, dtype=torch.float64)
        return dense.index_put_((rows, self.index[face]), values, accumulate=True)


def act_hard(soft: Soft, face: Face, x: Tensor, axis: int) -> Tensor:
    """Act on one axis of a tensor with a single element. A new tensor."""
    moved = x.index_select(axis, soft.index[face][:, 0].to(x.device))
    if face in soft.sign and bool((soft.sign[face] < 0).any()):
        moved *= soft.sign[face][:, 0].to(x).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    return moved


def act(spaces: Mapping[str, Space], softs: Sequence[Soft], face: Face, x: Tensor, axis: int) -> Tensor:
    """Act on `axis` (1 rows, 2 columns) of `x` (models, rows, columns, rest), with one soft element per model."""
    if all(soft.hard for soft in softs):
        return torch.stack([act_hard(soft, face, x[i], axis - 1) for i, soft in enumerate(softs)])
    first = x.movedim(axis, 1)
    moved = transform(spaces, softs, face, first.reshape(*first.shape[:2], -1))
    return moved.reshape(first.shape).movedim(1, axis)


def transform(spaces: Mapping[str, Space], softs: Sequence[Soft], face: Face, x: Tensor) -> Tensor:
    """Act on the middle axis of `x` (models, size of the face, rest), with one soft element per model."""
    models, size, rest = x.shape
    width = max(len(soft.shares) for soft in softs)
    out = torch.zeros_like(x)
    if width:
        index = torch.stack([_padded(soft.index[face], width) + i * size for i, soft in enumerate(softs)])
        weight = torch.stack([_weights(soft, face, width) for soft in softs])
        out = embedding_bag(
            index.reshape(-1).to(x.device),
            x.reshape(models * size, rest),
            torch.arange(0, models * size * width, width, device=x.device),
            mode="sum",
            per_sample_weights=weight.reshape(-1).to(x),
        ).reshape(x.shape)
    for i, soft in enumerate(softs):
        if soft.mean and not any(factor.signed for factor in face):
            out[i] += soft.mean * _group_mean(spaces, face, x[i])
    return out


def _padded(index: Tensor, width: int) -> Tensor:
    """(size, k) filled up with zeros to (size, width)."""
    return torch.nn.functional.pad(index, (0, width - index.shape[1]))


def _weights(soft: Soft, face: Face, width: int) -> Tensor:
    """The weight of every gathered row, (size of the face, width)."""
    weights = torch.tensor(soft.shares, dtype=torch.float64).expand(face_size(face), -1)
    if face in soft.sign:
        weights = weights * soft.sign[face]
    return _padded(weights, width)


def _group_mean(spaces: Mapping[str, Space], face: Face, x: Tensor) -> Tensor:
    """The mean over all elements of their images of `x` (size of the face, rest), for a face without signs."""
    unfolded = x.reshape(*(factor.size for factor in face), -1)
    moving = [
        axis
        for axis, factor in enumerate(face)
        if factor.space is not None and spaces[factor.space].symmetry != "fixed"
    ]
    return unfolded.mean(dim=moving, keepdim=True).expand(unfolded.shape).reshape(x.shape)
