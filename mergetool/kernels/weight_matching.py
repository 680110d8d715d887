"""Weight matching: align models by hard moves, one model and one family at a time.

With all else held, the objective is linear in one group element, so the best element is one assignment away, and every
accepted move increases the objective. Repeating until nothing moves gives three methods at once: pairwise
git-rebasin (every model against one, the anchor), MergeMany (each model in turn against the sum of the others), and the
polish that follows Frank-Wolfe.

Families that share no piece do not see each other (the hidden layers of a transformer, given its residual stream), so
they are solved side by side.

Reference: Ainsworth et al., Git Re-Basin, ICLR 2023, https://arxiv.org/abs/2209.04836, algorithm 1, and MergeMany in
the appendix.
Differs from the paper: families are visited in the network's order, those that cannot have changed are left out, and
models in the given order. The paper draws both orders at random, so that its result depends on the draw.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from mergetool.kernels.assignment import Array, Choice, best_element
from mergetool.kernels.matching import MatchingProblem, PieceView, Point, objective
from mergetool.kernels.permute import Element
from mergetool.kernels.pieces import Face
from mergetool.kernels.soft import Soft, act_hard

WORTH = 1e-9  # share of the objective below which a gain is rounding
MAX_SWEEPS = 100
LARGE = 128  # rows; handing a smaller problem to a thread costs more than solving it

Request: TypeAlias = tuple[int, dict[Face, Array], Choice]  # key, scores, incumbent


def match_to_reference(
    problem: MatchingProblem, anchor: int, share: Callable[..., Iterable[Element]] = map
) -> tuple[Element, ...]:
    """Pairwise git-rebasin: every model matched to model `anchor` alone, from the identity.

    Elements map model coordinates to those of the anchor. `share` is `map`, or shares the models between processes.
    """
    identity = Element.identity(problem.spaces)

    def match(model: Mapping[str, Tensor]) -> Element:
        pair = replace(problem, models=[problem.models[anchor], model])
        point, _ = ascend(pair, hard_point(pair, [identity, identity]), [1])
        return point[1].elements[0]

    others = [model for i, model in enumerate(problem.models) if i != anchor]
    matched = list(share(match, others))
    return (*matched[:anchor], identity, *matched[anchor:])


def merge_many(problem: MatchingProblem) -> tuple[tuple[Element, ...], tuple[float, ...]]:
    """MergeMany: each model in turn matched to the sum of the others, from the identity, until nothing moves.

    Returns elements that map model coordinates to universe coordinates, and the objective before and after every sweep.
    """
    start = hard_point(problem, [Element.identity(problem.spaces)] * len(problem.models))
    point, history = ascend(problem, start, range(len(problem.models)))
    return tuple(soft.elements[0] for soft in point), history


def hard_point(problem: MatchingProblem, elements: Sequence[Element]) -> Point:
    """The point at one element per model."""
    return tuple(Soft.at(element, problem.faces) for element in elements)


def ascend(problem: MatchingProblem, point: Point, movers: Sequence[int]) -> tuple[Point, tuple[float, ...]]:
    """Match each of `movers` in turn to the sum of the others until nothing moves.

    `point` must be hard. Returns the point reached and the objective before and after every sweep.
    """
    history = [objective(problem, point)]
    climb = _Climb(problem, point, WORTH * abs(history[0]))
    for _ in range(MAX_SWEEPS):
        gained = sum(climb.match(i) for i in movers)
        if gained == 0:
            break
        history.append(history[-1] + gained)
    return tuple(climb.point), tuple(history)


def solve(problem: MatchingProblem, requests: Iterable[Request]) -> dict[int, Choice]:
    """Answer assignment problems, large ones in a thread pool (scipy's solver releases the interpreter lock).

    Requests are drawn only as threads become free, so that few gradients are held at once.
    """
    answers: dict[int, Choice] = {}
    pending: deque[tuple[int, Future[Choice]]] = deque()
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        for key, scores, incumbent in requests:
            if threads == 1 or max(len(score) for score in scores.values()) < LARGE:
                answers[key] = best_element(problem.spaces, scores, incumbent)
                continue
            pending.append((key, pool.submit(best_element, problem.spaces, scores, incumbent)))
            if len(pending) > threads:
                oldest, answer = pending.popleft()
                answers[oldest] = answer.result()
        answers.update((key, answer.result()) for key, answer in pending)
    return answers


def as_choice(element: Element) -> Choice:
    """An element as an incumbent of the assignment oracles."""
    return Choice(
        0.0,
        {name: index.numpy() for name, index in element.index.items()},
        {name: sign.numpy() for name, sign in element.sign.items()},
    )


def replaced(element: Element, choice: Choice) -> Element:
    """`element` with the spaces of `choice` replaced."""
    index = {name: torch.from_numpy(value) for name, value in choice.index.items()}
    sign = {name: torch.from_numpy(value) for name, value in choice.sign.items()}
    return Element(element.spaces, {**element.index, **index}, {**element.sign, **sign})


class _Climb:
    """The state of an ascent: where every model is, the sum of all images, and which moves are known not to gain.

    The sum (as large as one model) is what makes a move cheap: it involves the tensors of one model alone.
    """

    def __init__(self, problem: MatchingProblem, point: Point, worth: float) -> None:
        self.problem = problem
        self.point = list(point)
        self.worth = worth
        self.sums = [PieceView(problem, number, point).image.sum(dim=0) for number in range(len(problem.pieces))]
        self.settled: set[tuple[int, int]] = set()  # (model, family)

    def match(self, i: int) -> float:
        """Match model i to the sum of the others, which stay. Returns what was gained."""
        total = 0.0
        while waiting := [f for f in range(len(self.problem.families)) if (i, f) not in self.settled]:
            batch = _independent(self.problem, waiting)
            incumbent = as_choice(self.point[i].elements[0])
            answers = solve(self.problem, ((f, self._scores(f, i), incumbent) for f in batch))
            for f in batch:
                self.settled.add((i, f))
                total += self._try(i, f, answers[f])
        return total

    def _scores(self, f: int, i: int) -> dict[Face, Array]:
        """What every place of family f would gain model i, against the sum of the others."""
        total: dict[Face, Tensor] = {}
        for number, side in self.problem.families[f].places:
            face = self.problem.pieces[number].faces[side]
            half = self._acted(number, i, self.point[i], but=side)
            others = self.sums[number] - act_hard(self.point[i], face, half, side)
            scores = others.movedim(side, 0).flatten(1) @ half.movedim(side, 0).flatten(1).T
            scores.mul_(self.problem.scales[number])
            total[face] = total[face].add_(scores) if face in total else scores
        return {face: score.cpu().numpy() for face, score in total.items()}

    def _try(self, i: int, f: int, choice: Choice) -> float:
        """Move family f of model i if that gains, by the exact change of the objective, which is returned."""
        before = self.point[i]
        after = replaced(before.elements[0], choice)
        if after.equals(before.elements[0]):
            return 0.0
        candidate = Soft.at(after, self.problem.faces)
        gain, moved = 0.0, {}
        for number in sorted({number for number, _ in self.problem.families[f].places}):
            old, new = (self._acted(number, i, soft) for soft in (before, candidate))
            others, moved[number] = self.sums[number] - old, new.sub_(old)
            gain += self.problem.scales[number] * float((others * moved[number]).sum(dtype=torch.float64))
        if gain <= self.worth:
            return 0.0
        self.point[i] = candidate
        for number, change in moved.items():
            self.sums[number] += change
        self._unsettle(i, f)
        return gain

    def _unsettle(self, i: int, f: int) -> None:
        """Model i moved by family f: forget what was known of all that depends on it."""
        near = _neighbours(self.problem, f)
        self.settled = {(j, g) for j, g in self.settled if g not in near and (j == i or g != f)}

    def _acted(self, number: int, i: int, soft: Soft, but: int | None = None) -> Tensor:
        """The universe image of a piece of model i, or with one side `but` left as it is."""
        piece = self.problem.pieces[number]
        x = self.problem.part(piece, i)
        for side, face in enumerate(piece.faces):
            if side != but:
                x = act_hard(soft, face, x, side)
        return x


def _independent(problem: MatchingProblem, numbers: Sequence[int]) -> list[int]:
    """As many of these families as share no piece, first come first served."""
    batch: list[int] = []
    for f in numbers:
        if not _neighbours(problem, f).intersection(batch):
            batch.append(f)
    return batch


def _neighbours(problem: MatchingProblem, f: int) -> set[int]:
    """The families whose gradient depends on family f: those on the other axis of its pieces."""
    sides = {(number, 1 - side) for number, side in problem.families[f].places}
    return {g for g, family in enumerate(problem.families) if sides.intersection(family.places)}
