"""Frank-Wolfe over the symmetry groups of n networks: cycle-consistent alignment of many models at once.

Every model gets one group element into a common universe (see `matching`), so maps between any two models compose
around cycles to the identity, by construction. The elements are relaxed to the convex hull of their group. Each
iteration linearises the objective, finds the best vertex of the hull for every model and family (an assignment
problem each), and moves towards it by the best step, which is known exactly. At the end every soft element is rounded
to the nearest vertex, and hard moves polish the result.

    joint   all models move together, by one common step (the paper's algorithm); no model comes first
    block   one model at a time, each by its own step

Two models can never move together: each would be turned to where the other was, the step would average the two, and
the iterate would go back and forth in the freedom of the universe's own order. So one of them stays. With three or
more models all move, and the order of the universe is fixed afterwards.

Where all starts end, no single move gains, but forgetting the places of two models at once and finding them anew often
does: such releases are tried from the best of the starts on.

Reference: Crisostomi et al., C2M3, NeurIPS 2024, https://arxiv.org/abs/2405.17897, section 3 and algorithm 1;
Lacoste-Julien, Convergence rate of Frank-Wolfe for non-convex objectives, 2016 (the gap).
Differs from the paper: exact line search, stopping by the Frank-Wolfe gap, one of two models held, block mode, a hard
polish, several starts, releases, groups beyond plain permutations (signs, heads within layers).
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, cycle, islice, pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mergetool.kernels.assignment import Choice
from mergetool.kernels.matching import (
    Curve,
    MatchingProblem,
    PieceView,
    Point,
    Views,
    curve,
    gradients,
    objective,
    views,
)
from mergetool.kernels.permute import Element
from mergetool.kernels.soft import Soft
from mergetool.kernels.weight_matching import Request, as_choice, ascend, hard_point, replaced, solve

STALLED = 1e-7  # relative gain, of an iteration or of another start, that counts as none
PATIENCE = 3
ROUNDING = 1e-12  # share of a polynomial's largest coefficient below which another one is rounding
HELD = 1 << 28  # bytes of all models up to which their images are held, not made anew: three times as much


@dataclass(frozen=True)
class AlignmentSettings:
    """How to search.

    `init`: "identity", or "barycenter" (the mean of the group; the anchor stays at the identity). `anchor`: the model
    whose order the universe takes, by default the first. `starts`: how many runs to choose the best from (the first of
    equals): one as asked, hard moves alone from the identity (MergeMany, so that the result is never below it), block
    mode from the identity, and block mode from the barycentre with one anchor after the other. `releases`: how often,
    with three models or more, two of them are put back to the barycentre and matched anew to the others.
    `tolerance`: stop when the gap is below this share of the objective.
    """

    mode: Literal["joint", "block"] = "joint"
    init: Literal["identity", "barycenter"] = "identity"
    anchor: int | None = None
    polish: bool = True
    starts: int = 3
    releases: int = 40
    iterations: int = 100
    tolerance: float = 1e-6


@dataclass(frozen=True)
class Iteration:
    """One iteration: the objective after it, the gap before it, and its length (in block mode: of the last model).

    Of a start by hard moves alone: one sweep over all models, and what it gained.
    """

    objective: float
    gap: float
    length: float


@dataclass(frozen=True)
class Alignment:
    """The result: `elements[i]` maps universe coordinates to those of model i; the anchor's is the identity.

    `history` is of the start that was kept; `rounded` is the objective after rounding, `objective` after the polish.
    """

    elements: tuple[Element, ...]
    objective: float
    rounded: float
    history: tuple[Iteration, ...]


def align(
    problem: MatchingProblem, settings: AlignmentSettings, share: Callable[..., Iterable[Any]] = map
) -> Alignment:
    """Align the models of `problem`. Deterministic. Raises ValueError for fewer than two models.

    `share` is `map`, or does what it does with the work of several starts shared between processes.
    """
    if len(problem.models) < 2:
        raise ValueError(f"alignment needs two models or more, got {len(problem.models)}")
    best: Alignment | None = None
    run = partial(_run, problem, anchor=settings.anchor or 0)
    for alignment, settled in share(run, tuple(_plans(settings, len(problem.models)))):
        if best is None or alignment.objective - best.objective > STALLED * abs(best.objective):
            best = alignment
        if settled:
            return best
    assert best is not None
    return _released(problem, settings, best) if settings.polish and len(problem.models) > 2 else best


def in_universe_of(elements: Sequence[Element], anchor: int) -> tuple[Element, ...]:
    """From elements model -> universe to elements universe -> model, with the universe in the anchor's order."""
    home = elements[anchor]
    return tuple(element.inverse() @ home for element in elements)


def best_step(along: Curve) -> float:
    """Where in [0, 1] the polynomial with these Bernstein coefficients (degree 4) is largest; the later of equals."""
    powers = _power(4 * np.diff(along))
    # In block mode the degree is two: what rounding leaves of the higher powers would spoil the root.
    slope = np.polynomial.Polynomial(powers).trim(ROUNDING * float(np.abs(powers).max()))
    roots: NDArray[np.complex128] = slope.roots().astype(np.complex128)
    inside = [float(r.real) for r in roots if abs(r.imag) < 1e-9 and 0 < r.real < 1]
    candidates = sorted({0.0, 1.0, *inside})
    values = [value_at(along, t) for t in candidates]
    return max(zip(values, candidates, strict=True))[1]


def value_at(along: Curve, t: float) -> float:
    """The polynomial at t, by de Casteljau's scheme: exact at both ends."""
    level: NDArray[np.float64] = along
    while len(level) > 1:
        level = (1 - t) * level[:-1] + t * level[1:]
    return float(level[0])


def _power(bernstein: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bernstein coefficients to those of 1, t, t^2, ..."""
    result: NDArray[np.float64] = np.zeros_like(bernstein)
    factor, rest = 1.0, bernstein
    for k in range(len(bernstein)):
        result[k] = factor * rest[0]
        factor *= (len(bernstein) - 1 - k) / (k + 1)
        rest = np.diff(rest)
    return result


def _plans(settings: AlignmentSettings, num_models: int) -> Iterator[AlignmentSettings]:
    """The starts, each as settings of its own."""
    plans = [settings]
    if settings.polish:
        plans.append(replace(settings, mode="block", init="identity", iterations=0))
    if num_models > 2:
        plans.append(replace(settings, mode="block", init="identity"))
    first = settings.anchor or 0
    for k in range(num_models):
        plans.append(replace(settings, mode="block", init="barycenter", anchor=(first + k) % num_models))
    return islice(dict.fromkeys(plans), settings.starts)


def _run(problem: MatchingProblem, plan: AlignmentSettings, anchor: int) -> tuple[Alignment, bool]:
    """One start. Also says whether it began at a vertex that nothing improves."""
    num_models = len(problem.models)
    anchor = plan.anchor or 0
    held = {anchor} if num_models == 2 or plan.init == "barycenter" else set()
    movers = [i for i in range(num_models) if i not in held]
    point = hard_point(problem, [Element.identity(problem.spaces)] * num_models)
    if plan.init == "barycenter":
        point = tuple(s if i in held else Soft.middle(problem.faces) for i, s in enumerate(point))
    blocks = [movers] if plan.mode == "joint" else [[i] for i in movers]
    point, history, stationary = _iterate(problem, point, blocks, plan)
    if not stationary:
        point = _round(problem, point)
    rounded = reached = objective(problem, point)
    if plan.polish and not stationary:
        point, sweeps = ascend(problem, point, movers if num_models == 2 else range(num_models))
        reached = sweeps[-1]
        history = history or tuple(Iteration(after, after - before, 1.0) for before, after in pairwise(sweeps))
    elements = in_universe_of([soft.elements[0] for soft in point], anchor)
    return Alignment(elements, reached, rounded, history), stationary and len(history) == 1


def _released(problem: MatchingProblem, settings: AlignmentSettings, best: Alignment) -> Alignment:
    """The best alignment after letting two of the models go at once, again and again, another two each time."""
    plan = replace(settings, mode="block", init="barycenter")
    models = range(len(problem.models))
    pairs = list(combinations(models, 2))
    random.Random(0).shuffle(pairs)
    first = best.elements[0]  # in its order, so that the anchor does not matter
    point = hard_point(problem, [first @ element.inverse() for element in best.elements])
    reached, idle = best.objective, 0
    for released in islice(cycle(pairs), settings.releases):
        moved = tuple(Soft.middle(problem.faces) if i in released else soft for i, soft in enumerate(point))
        moved, _, _ = _iterate(problem, moved, [[i] for i in released], plan)
        moved, sweeps = ascend(problem, _round(problem, moved), models)
        gains = sweeps[-1] - reached > STALLED * abs(reached)
        idle = 0 if gains else idle + 1
        if gains:
            point, reached = moved, sweeps[-1]
        if idle == len(pairs):
            break
    elements = in_universe_of([soft.elements[0] for soft in point], settings.anchor or 0)
    return replace(best, elements=elements, objective=reached)


def _iterate(
    problem: MatchingProblem, point: Point, blocks: Sequence[Sequence[int]], plan: AlignmentSettings
) -> tuple[Point, tuple[Iteration, ...], bool]:
    """Frank-Wolfe until the gap closes, progress stalls, or the iterations are used up.

    Returns the last point, the history, and whether the point is a vertex from which no single move gains.
    """
    value, history, stalled, stationary = objective(problem, point), list[Iteration](), 0, False
    held = [PieceView(problem, k, point) for k in range(len(problem.pieces))] if problem.size <= HELD else None
    while len(history) < plan.iterations and stalled < PATIENCE:
        before, gap, length, stationary = value, 0.0, 0.0, True
        for movers in blocks:
            seen = held.__getitem__ if held else views(problem, point)
            target = _best_vertex(problem, point, movers, seen)
            if _same(point, target):
                continue
            along = curve(problem, point, target, movers=movers, seen=seen)
            gap += 4 * (along[1] - along[0])
            length = best_step(along)
            value += value_at(along, length) - along[0]
            stationary = False
            point = tuple(s if s is t else s.toward(t, length) for s, t in zip(point, target, strict=True))
            if held:
                held = [view.toward(point, target, movers, length) for view in held]
        history.append(Iteration(value, gap, length))
        stalled = stalled + 1 if value - before <= STALLED * abs(value) else 0
        if gap <= plan.tolerance * abs(value):
            break
    return point, tuple(history), stationary


def _best_vertex(problem: MatchingProblem, point: Point, movers: Sequence[int], seen: Views) -> Point:
    """The vertex of the hull that the gradient at `point` favours, for the models `movers`; the others stay."""
    latest = [soft.elements[-1] if soft.elements else Element.identity(problem.spaces) for soft in point]
    incumbents = [as_choice(element) for element in latest]

    def requests() -> Iterator[Request]:
        for f, scores in gradients(problem, point, movers, seen):
            for j, i in enumerate(movers):
                own = {face: score[j].cpu().numpy() for face, score in scores.items()}
                yield f * len(point) + i, own, incumbents[i]

    return _at_answers(problem, point, latest, solve(problem, requests()))


def _round(problem: MatchingProblem, point: Point) -> Point:
    """The vertices nearest to the soft elements of `point`."""
    latest = [soft.elements[-1] for soft in point]

    def requests() -> Iterator[Request]:
        for f, family in enumerate(problem.families):
            faces = {problem.pieces[number].faces[side] for number, side in family.places}
            for i, soft in enumerate(point):
                if not soft.hard:
                    own = {face: soft.matrix(face).numpy() for face in problem.faces if face in faces}
                    yield f * len(point) + i, own, as_choice(latest[i])

    return _at_answers(problem, point, latest, solve(problem, requests()))


def _at_answers(
    problem: MatchingProblem, point: Point, elements: Sequence[Element], answers: Mapping[int, Choice]
) -> Point:
    """The point with the answered models at their vertices; answers are keyed by family * models + model."""
    moved = dict(enumerate(elements))
    for key, choice in answers.items():
        moved[key % len(point)] = replaced(moved[key % len(point)], choice)
    answered = {key % len(point) for key in answers}
    return tuple(Soft.at(moved[i], problem.faces) if i in answered else soft for i, soft in enumerate(point))


def _same(point: Point, target: Point) -> bool:
    """Whether a point already is the vertex `target`."""
    return all(s is t or (s.hard and s.elements[0].equals(t.elements[0])) for s, t in zip(point, target, strict=True))
