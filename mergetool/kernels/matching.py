"""The objective of multi-model alignment, its gradient, and its course along a segment.

n networks of one architecture hold the same features in different orders. Give every model one group element Q_i that
carries its weights into a common *universe*, U_i = Q_i W_i, and ask that the images agree:

    F(Q) = sum over pairs i < j, tensors k of   lambda_k <U_i^k, U_j^k>
         = 1/2 sum_k lambda_k (|S^k|^2 - sum_i |U_i^k|^2),      S = sum_i U_i

The second form is linear in the number of models, where the pairs are quadratic. So is the gradient: with the others'
sum R_i = S - U_i, a face on the rows of a weight gets  lambda R_i (W_i Q_c^T)^T.  A family's gradient is the sum over
all places where it occurs; this is how neighbouring layers talk to each other.

Along a segment from one point to another, U_i(t) = (1-t)^2 B0 + 2t(1-t) B1 + t^2 B2 with three images per piece, so
F is a polynomial of degree four whose five Bernstein coefficients follow from inner products of those images. The
slope at 0 is the Frank-Wolfe gap, and the best step is known exactly.

Reference: Crisostomi et al., C2M3, NeurIPS 2024, https://arxiv.org/abs/2405.17897, section 3.
Differs from the paper: the half-norm form in place of loops over pairs; an exact line search in place of a numerical
one; tensors may be weighted (`lambda`), and tensors that nothing moves are left out (they add a constant).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergetool.kernels.pieces import Face, Family, Piece, cut, families
from mergetool.kernels.soft import Soft, transform
from mergetool.kernels.spaces import Layout, Space

Point: TypeAlias = tuple[Soft, ...]  # one soft element per model
Curve: TypeAlias = NDArray[np.float64]  # (5,) Bernstein coefficients of degree 4 over [0, 1]


@dataclass(frozen=True)
class Problem:
    """n models of one architecture to be aligned.

    `models`: n mappings from tensor names to tensors; they may read lazily, each tensor is asked for when needed.
    `scales[k]` weighs piece k in the objective.
    """

    spaces: Mapping[str, Space]
    models: Sequence[Mapping[str, Tensor]]
    pieces: tuple[Piece, ...]
    families: tuple[Family, ...]
    scales: tuple[float, ...]
    faces: tuple[Face, ...]

    @classmethod
    def of(
        cls,
        spaces: Mapping[str, Space],
        layouts: Mapping[str, Sequence[Layout]],
        *,
        models: Sequence[Mapping[str, Tensor]],
        per_tensor: bool = False,
    ) -> "Problem":
        """Align `models` over the tensors in `layouts` (one layout per axis).

        `per_tensor`: every tensor counts alike, by 1 / (mean over models of its squared norm); without it large
        tensors (embeddings) decide. Raises ValueError for a tensor of which more than two axes move.
        """
        pieces = cut(spaces, layouts)
        scales = {name: _scale(models, name) if per_tensor else 1.0 for name in layouts}
        return cls(
            spaces,
            models,
            pieces,
            families(spaces, pieces),
            tuple(scales[piece.tensor] for piece in pieces),
            tuple(dict.fromkeys(face for piece in pieces for face in piece.faces)),
        )

    def stack(self, number: int) -> Tensor:
        """Piece `number` of all models, (models, rows, columns, rest), in float32 or better."""
        piece = self.pieces[number]
        parts = [piece.view(model[piece.tensor].detach()) for model in self.models]
        dtype = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
        return torch.stack([part.to(dtype) for part in parts])


def _scale(models: Sequence[Mapping[str, Tensor]], name: str) -> float:
    squared = [float(model[name].detach().double().square().sum()) for model in models]
    return len(squared) / sum(squared) if sum(squared) > 0 else 0.0


def objective(problem: Problem, point: Point) -> float:
    """F at a point."""
    total = 0.0
    for number, scale in enumerate(problem.scales):
        image = _image(problem, number, problem.stack(number), point)
        rows = image.shape[1]
        own, together = _inner(image[None], rows * len(point)), _inner(image.sum(dim=0)[None], rows)
        total += scale * 0.5 * float(together[0, 0] - own[0, 0])
    return total


def gradient(problem: Problem, family: Family, point: Point, movers: Sequence[int]) -> dict[Face, Tensor]:
    """dF/dQ of the models `movers`, for every face of a family: (movers, universe, model)."""
    total: dict[Face, Tensor] = {}
    moving = list(movers)
    for number, side in family.places:
        faces = problem.pieces[number].faces
        half = problem.stack(number)
        if len(faces) == 2:
            half = _act(problem, point, faces[1 - side], half, 2 - side)
        image = _act(problem, point, faces[side], half, 1 + side)
        others = image.sum(dim=0) - image[moving]
        scores = torch.bmm(_unfold(others, 1 + side), _unfold(half[moving], 1 + side).mT)
        scores.mul_(problem.scales[number])
        total[faces[side]] = total[faces[side]].add_(scores) if faces[side] in total else scores
    return total


def curve(
    problem: Problem, start: Point, end: Point, *, movers: Sequence[int], pieces: Iterable[int] | None = None
) -> Curve:
    """F along the segment from `start` to `end`, on which only the models `movers` move.

    Bernstein coefficients of degree 4, summed over `pieces` (by default all), less the constant that the models
    that stay contribute among themselves.
    """
    total = np.zeros(5)
    for number in range(len(problem.pieces)) if pieces is None else pieces:
        total += problem.scales[number] * _piece_curve(problem, number, start, end, list(movers))
    return total


def _piece_curve(problem: Problem, number: int, start: Point, end: Point, movers: list[int]) -> Curve:
    stack = problem.stack(number)
    stay = [i for i in range(len(start)) if i not in movers]
    leaving, arriving = [start[i] for i in movers], [end[i] for i in movers]
    bends = _bends(problem, number, stack[movers], leaving, arriving)  # (3, movers, rows, columns, rest)
    total, rows = bends.sum(dim=1), bends.shape[2]
    result = np.zeros(5)
    if stay:
        others = _image(problem, number, stack[stay], [start[i] for i in stay]).sum(dim=0)
        a, b, c = _inner(torch.cat([total, others[None]]), rows)[3, :3]
        result += [a, (a + b) / 2, (a + 4 * b + c) / 6, (b + c) / 2, c]
    if len(movers) > 1:
        q = 0.5 * (_inner(total, rows) - _inner(bends, rows * len(movers)))
        result += [q[0, 0], q[0, 1], (q[0, 2] + 2 * q[1, 1]) / 3, q[1, 2], q[2, 2]]
    return result


def _bends(problem: Problem, number: int, stack: Tensor, start: Sequence[Soft], end: Sequence[Soft]) -> Tensor:
    """The three Bernstein coefficients of the images along a segment, (3, models, rows, columns, rest)."""
    faces = problem.pieces[number].faces
    if len(faces) == 1:
        here, there = (_act(problem, softs, faces[0], stack, 1) for softs in (start, end))
        return torch.stack([here, (here + there) / 2, there])
    left, right = (_act(problem, softs, faces[1], stack, 2) for softs in (start, end))
    mixed = _act(problem, end, faces[0], left, 1) + _act(problem, start, faces[0], right, 1)
    return torch.stack([_act(problem, start, faces[0], left, 1), mixed / 2, _act(problem, end, faces[0], right, 1)])


def _image(problem: Problem, number: int, stack: Tensor, softs: Sequence[Soft]) -> Tensor:
    """Universe images of a piece of some models, (models, rows, columns, rest)."""
    for side, face in enumerate(problem.pieces[number].faces):
        stack = _act(problem, softs, face, stack, 1 + side)
    return stack


def _act(problem: Problem, softs: Sequence[Soft], face: Face, x: Tensor, axis: int) -> Tensor:
    """Act on `axis` (1 rows, 2 columns) of `x` (models, rows, columns, rest)."""
    first = x.movedim(axis, 1)
    moved = transform(problem.spaces, softs, face, first.reshape(*first.shape[:2], -1))
    return moved.reshape(first.shape).movedim(1, axis)


def _unfold(x: Tensor, axis: int) -> Tensor:
    """(models, rows, columns, rest) -> (models, size of `axis`, everything else)."""
    return x.movedim(axis, 1).flatten(start_dim=2)


def _inner(x: Tensor, rows: int) -> NDArray[np.float64]:
    """Inner products between x[0], x[1], ...: in the dtype of `x` within each of `rows` rows, float64 across them."""
    by_row = x.reshape(x.shape[0], rows, -1).transpose(0, 1)  # (rows, items, elements of a row)
    products: NDArray[np.float64] = torch.bmm(by_row, by_row.mT).sum(dim=0, dtype=torch.float64).cpu().numpy()
    return products
