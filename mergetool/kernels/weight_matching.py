"""Weight matching: align models by hard moves, one model and one family at a time.

With all else held, the objective is linear in one group element, so the best element is one assignment away, and every
accepted move increases the objective. Repeating until nothing moves gives three methods at once: pairwise
git-rebasin (one model against a reference), MergeMany (each model in turn against the sum of the others), and the
polish that follows Frank-Wolfe.

Families that share no piece do not see each other (the hidden layers of a transformer, given its residual stream), so
they are solved side by side.

Reference: Ainsworth et al., Git Re-Basin, ICLR 2023, https://arxiv.org/abs/2209.04836, algorithm 1, and MergeMany in
the appendix.
Differs from the paper: families are visited in the network's order, those that cannot have changed are left out, and
models in the given order. The paper draws both orders at random, so that its result depends on the draw.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TypeAlias

import torch

from mergetool.kernels.assignment import Array, Choice, best_element
from mergetool.kernels.matching import Point, Problem, curve, gradient, objective
from mergetool.kernels.permute import Element
from mergetool.kernels.pieces import Face
from mergetool.kernels.soft import Soft

WORTH = 1e-9  # share of the objective below which a gain is rounding
MAX_SWEEPS = 100
LARGE = 128  # rows; handing a smaller problem to a thread costs more than solving it

Request: TypeAlias = tuple[int, dict[Face, Array], Choice]  # key, scores, incumbent


def match_to_reference(problem: Problem, reference: int) -> tuple[Element, ...]:
    """Pairwise git-rebasin: every model matched to model `reference` alone, from the identity.

    Elements map model coordinates to those of the reference.
    """
    identity = Element.identity(problem.spaces)
    matched = []
    for i, model in enumerate(problem.models):
        if i == reference:
            matched.append(identity)
        else:
            pair = replace(problem, models=[problem.models[reference], model])
            point, _ = ascend(pair, hard_point(pair, [identity, identity]), [1])
            matched.append(point[1].elements[0])
    return tuple(matched)


def merge_many(problem: Problem) -> tuple[tuple[Element, ...], tuple[float, ...]]:
    """MergeMany: each model in turn matched to the sum of the others, from the identity, until nothing moves.

    Returns elements that map model coordinates to universe coordinates, and the objective before and after every sweep.
    """
    start = hard_point(problem, [Element.identity(problem.spaces)] * len(problem.models))
    point, history = ascend(problem, start, range(len(problem.models)))
    return tuple(soft.elements[0] for soft in point), history


def hard_point(problem: Problem, elements: Sequence[Element]) -> Point:
    """The point at one element per model."""
    return tuple(Soft.at(element, problem.faces) for element in elements)


def ascend(problem: Problem, point: Point, movers: Sequence[int]) -> tuple[Point, tuple[float, ...]]:
    """Match each of `movers` in turn to the sum of the others until nothing moves.

    `point` must be hard. Returns the point reached and the objective before and after every sweep.
    """
    history = [objective(problem, point)]
    for _ in range(MAX_SWEEPS):
        gained = 0.0
        for i in movers:
            point, gain = _match(problem, point, i, WORTH * abs(history[0]))
            gained += gain
        if gained == 0:
            break
        history.append(history[-1] + gained)
    return point, tuple(history)


def solve(problem: Problem, requests: Iterable[Request]) -> dict[int, Choice]:
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


def _match(problem: Problem, point: Point, i: int, worth: float) -> tuple[Point, float]:
    """Match model i to the sum of the others, which stay. Returns the new point and what was gained."""
    total = 0.0
    waiting = set(range(len(problem.families)))
    while waiting:
        batch = _independent(problem, sorted(waiting))
        waiting -= set(batch)
        incumbent = as_choice(point[i].elements[0])
        answers = solve(problem, ((f, _scores(problem, f, point, i), incumbent) for f in batch))
        for f in batch:
            candidate, gain = _try(problem, point, i, f, answers[f])
            if gain > worth:
                point, total = candidate, total + gain
                waiting |= _neighbours(problem, f)
    return point, total


def _try(problem: Problem, point: Point, i: int, f: int, choice: Choice) -> tuple[Point, float]:
    """The point with family f of model i moved, and the exact change of the objective."""
    before = point[i].elements[0]
    after = replaced(before, choice)
    if after.equals(before):
        return point, 0.0
    candidate = (*point[:i], Soft.at(after, problem.faces), *point[i + 1 :])
    touched = sorted({number for number, _ in problem.families[f].places})
    change = curve(problem, point, candidate, movers=[i], pieces=touched)
    return candidate, float(change[4] - change[0])


def _scores(problem: Problem, f: int, point: Point, i: int) -> dict[Face, Array]:
    scores = gradient(problem, problem.families[f], point, [i])
    return {face: score[0].cpu().numpy() for face, score in scores.items()}


def _independent(problem: Problem, numbers: Sequence[int]) -> list[int]:
    """As many of these families as share no piece, first come first served."""
    batch: list[int] = []
    for f in numbers:
        if not _neighbours(problem, f).intersection(batch):
            batch.append(f)
    return batch


def _neighbours(problem: Problem, f: int) -> set[int]:
    """The families whose gradient depends on family f: those on the other axis of its pieces."""
    sides = {(number, 1 - side) for number, side in problem.families[f].places}
    return {g for g, family in enumerate(problem.families) if sides.intersection(family.places)}
