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

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergetool.kernels.pieces import Face, FaceFamily, Piece, cut, face_size, families
from mergetool.kernels.soft import Soft, act
from mergetool.kernels.spaces import Layout, Space

Point: TypeAlias = tuple[Soft, ...]  # one soft element per model
Curve: TypeAlias = NDArray[np.float64]  # (5,) Bernstein coefficients of degree 4 over [0, 1]


@dataclass(frozen=True)
class MatchingProblem:
    """n models of one architecture to be aligned.

    `models`: n mappings from tensor names to tensors; they may read lazily, each tensor is asked for when needed.
    `scales[k]` weighs piece k in the objective.
    """

    spaces: Mapping[str, Space]
    models: Sequence[Mapping[str, Tensor]]
    pieces: tuple[Piece, ...]
    families: tuple[FaceFamily, ...]
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
    ) -> "MatchingProblem":
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
        return torch.stack([self.part(piece, i) for i in range(len(self.models))])

    def part(self, piece: Piece, i: int) -> Tensor:
        """A piece of model i, (rows, columns, rest), in float32 or better."""
        part = piece.view(self.models[i][piece.tensor].detach())
        return part.to(torch.float64 if part.dtype == torch.float64 else torch.float32)

    @property
    def size(self) -> int:
        """Bytes of all pieces of all models."""
        return sum(4 * prod(piece.shape) for piece in self.pieces) * len(self.models)


def _scale(models: Sequence[Mapping[str, Tensor]], name: str) -> float:
    squared = [float(model[name].detach().double().square().sum()) for model in models]
    return len(squared) / sum(squared) if sum(squared) > 0 else 0.0


class PieceView:
    """A piece of all models at a point: rows acted on, columns acted on, and both, each (models, rows, columns, rest).

    Each is made when it is first asked for.
    """

    def __init__(
        self, problem: MatchingProblem, number: int, point: Sequence[Soft], known: Mapping[str, Tensor] | None = None
    ) -> None:
        self.problem = problem
        self.number = number
        self.point = point
        self.faces = problem.pieces[number].faces
        vars(self).update(known or {})  # what the properties would make

    @cached_property
    def weights(self) -> Tensor:
        """As they are in the models."""
        return self.problem.stack(self.number)

    @cached_property
    def rows(self) -> Tensor:
        return self._act(self.faces[0], self.weights, 1)

    @cached_property
    def columns(self) -> Tensor:
        return self.weights if len(self.faces) == 1 else self._act(self.faces[1], self.weights, 2)

    @cached_property
    def image(self) -> Tensor:
        if len(self.faces) == 2 and "columns" not in vars(self):
            return self._act(self.faces[1], self.rows, 2)
        return self._act(self.faces[0], self.columns, 1)

    def _act(self, face: Face, x: Tensor, axis: int) -> Tensor:
        return act(self.problem.spaces, self.point, face, x, axis)

    def toward(self, point: Point, end: Sequence[Soft], movers: Sequence[int], step: float) -> "PieceView":
        """The view at `point`, which is a share `step` of the way to `end` for `movers`: by sums of hard images."""
        path = _Path(self, end, movers)
        here, mixed, there = path.bends
        image = (1 - step) ** 2 * here + 2 * step * (1 - step) * mixed + step**2 * there
        moved = {"image": image, "rows": torch.lerp(path.rows, path.far_rows, step)}
        if len(self.faces) == 2:
            moved["columns"] = torch.lerp(path.columns, path.far_columns, step)
        if len(movers) < len(point):
            moved = {name: getattr(self, name).index_copy(0, path.places, x) for name, x in moved.items()}
        return PieceView(self.problem, self.number, point, {"weights": self.weights, **moved})


class _Path:
    """A piece of `movers` on the way from a view to the elements `end`.

    Rows and columns move together, so a share t of the way the image is `(1-t)^2 here + 2t(1-t) mixed + t^2 there`.
    These three, its `bends`, are all that is made: with them every length of a step is known, and as `end` consists of
    permutations, each is a matter of gathering rows and columns, where a point halfway would take products of matrices.
    """

    def __init__(self, view: PieceView, end: Sequence[Soft], movers: Sequence[int]) -> None:
        spaces, faces = view.problem.spaces, view.faces
        self.places = torch.tensor(list(movers), device=view.image.device)
        weights, self.rows, self.columns, self.here = (
            _of(x, list(movers)) for x in (view.weights, view.rows, view.columns, view.image)
        )
        softs = [end[i] for i in movers]
        self.far_rows = act(spaces, softs, faces[0], weights, 1)
        self.far_columns = weights
        self.bends = (self.here, (self.here + self.far_rows) / 2, self.far_rows)
        if len(faces) == 2:
            self.far_columns = act(spaces, softs, faces[1], weights, 2)
            # Half of the two images in which one side has arrived and the other has not left yet.
            mixed = act(spaces, softs, faces[1], self.rows, 2).add_(act(spaces, softs, faces[0], self.columns, 1))
            self.bends = (self.here, mixed.div_(2), act(spaces, softs, faces[1], self.far_rows, 2))


Views: TypeAlias = Callable[[int], PieceView]  # from the number of a piece


def views(problem: MatchingProblem, point: Point) -> Views:
    """All pieces at a point, made anew each time they are asked for."""
    return lambda number: PieceView(problem, number, point)


def objective(problem: MatchingProblem, point: Point) -> float:
    """F at a point."""
    total = 0.0
    for number, scale in enumerate(problem.scales):
        image = PieceView(problem, number, point).image
        rows = image.shape[1]
        own, together = _inner(image[None], rows * len(point)), _inner(image.sum(dim=0)[None], rows)
        total += scale * 0.5 * float(together[0, 0] - own[0, 0])
    return total


def gradients(
    problem: MatchingProblem, point: Point, movers: Sequence[int], seen: Views | None = None
) -> Iterator[tuple[int, dict[Face, Tensor]]]:
    """dF/dQ of the models `movers`, family by family: its number, and for each of its faces (movers, universe, model).

    Pieces are gone through once; a family comes out when the last of its places has been seen, so that few scores are
    held at once. `seen`: the pieces at `point`, where they are held.
    """
    seen, moving = seen or views(problem, point), list(movers)
    at = {place: f for f, family in enumerate(problem.families) for place in family.places}
    left = [len(family.places) for family in problem.families]
    totals: list[dict[Face, Tensor]] = [{} for _ in problem.families]
    for number, scale in enumerate(problem.scales):
        view = seen(number)
        others = view.image.sum(dim=0) - _of(view.image, moving)
        for side, face in enumerate(view.faces):
            half = view.columns if side == 0 else view.rows
            scores = torch.bmm(_unfold(others, 1 + side), _unfold(_of(half, moving), 1 + side).mT).mul_(scale)
            f = at[number, side]
            totals[f][face] = totals[f][face].add_(scores) if face in totals[f] else scores
            left[f] -= 1
            if not left[f]:
                yield f, totals[f]
                totals[f] = {}


def waiting_scores(pieces: Sequence[Piece], linked: Sequence[FaceFamily]) -> int:
    """Numbers that `gradients` holds at most for one model: the scores of families begun and not yet complete."""
    sizes = [{pieces[number].faces[side] for number, side in family.places} for family in linked]
    spans = [[number for number, _ in family.places] for family in linked]
    return max(
        sum(
            sum(face_size(face) ** 2 for face in faces)
            for faces, span in zip(sizes, spans, strict=True)
            if min(span) <= number <= max(span)
        )
        for number in range(len(pieces))
    )


def curve(
    problem: MatchingProblem, start: Point, end: Point, *, movers: Sequence[int], seen: Views | None = None
) -> Curve:
    """F along the segment from `start` to `end`, on which only the models `movers` move.

    Bernstein coefficients of degree 4, less the constant that the models that stay contribute among themselves.
    `seen`: the pieces at `start`, where they are held.
    """
    total = np.zeros(5)
    seen = seen or views(problem, start)
    for number, scale in enumerate(problem.scales):
        total += scale * _piece_curve(seen(number), end, list(movers))
    return total


def _piece_curve(view: PieceView, end: Point, movers: list[int]) -> Curve:
    bends = torch.stack(_Path(view, end, movers).bends)  # (3, movers, rows, columns, rest)
    stay = [i for i in range(len(end)) if i not in movers]
    total, rows = bends.sum(dim=1), bends.shape[2]
    result = np.zeros(5)
    if stay:
        others = view.image[stay].sum(dim=0)
        here, mixed, there = _inner(torch.cat([total, others[None]]), rows)[3, :3]
        result += [here, (here + mixed) / 2, (here + 4 * mixed + there) / 6, (mixed + there) / 2, there]
    if len(movers) > 1:
        cross = 0.5 * (_inner(total, rows) - _inner(bends, rows * len(movers)))
        result += [cross[0, 0], cross[0, 1], (cross[0, 2] + 2 * cross[1, 1]) / 3, cross[1, 2], cross[2, 2]]
    return result


def _of(x: Tensor, models: list[int]) -> Tensor:
    """Those models of `x` (models, ...); a copy only where some are left out."""
    return x if models == list(range(len(x))) else x[models]


def _unfold(x: Tensor, axis: int) -> Tensor:
    """(models, rows, columns, rest) -> (models, size of `axis`, everything else)."""
    return x.movedim(axis, 1).flatten(start_dim=2)


def _inner(x: Tensor, rows: int) -> NDArray[np.float64]:
    """Inner products between x[0], x[1], ...: in the dtype of `x` within each of `rows` rows, float64 across them."""
    by_row = x.reshape(x.shape[0], rows, -1).transpose(0, 1)  # (rows, items, elements of a row)
    products: NDArray[np.float64] = torch.bmm(by_row, by_row.mT).sum(dim=0, dtype=torch.float64).cpu().numpy()
    return products
