"""Linear assignment over the symmetry group of a network: the group element that fits a score matrix best.

Aligning models means choosing, again and again, the element Q of a group for which the sum of scores of the matched
coordinates is largest. For a plain permutation this is the linear assignment problem. Groups with more structure come
down to it, exactly:

    signed permutation   assign on the absolute scores, then take the sign of each chosen entry
    one common sign      assign for +, assign for -, keep the better one
    nested (heads)       solve the inside for every pair of heads; the values found are the scores of the outer problem
    coupled siblings     (grouped-query attention: the heads in a KV group, and the channels they share)
                         for every order of the smaller one (4 or fewer) solve the rest; alternate if there are more

Scores arrive per *face*: the tuple of factors by which an axis is laid out over the spaces of a group. A face of sizes
(a, b) has scores of shape (a, b, a, b): universe coordinates first, coordinates of the model last.

Ties (dead or duplicated neurons) are broken in favour of the incumbent: scores that differ by less than the rounding
of their own dtype count as equal.

Every problem is solved from scratch, large ones in threads. Starting from the duals of the last iteration was tried on
real gradients of width 512: it makes solving two to five times as fast, but scipy returns no duals, and finding them
costs most of what is won (1.2 to 1.4 times in all).

Reference: Kuhn 1955; Crouse, On implementing 2D rectangular assignment algorithms, 2016 (what scipy runs).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergetool.kernels.extensions import extension
from mergetool.kernels.spaces import Factor, Segment, Space

Array: TypeAlias = NDArray[Any]
Scores: TypeAlias = Mapping[Segment, Array]

MAX_ENUMERATED = 4  # 24 orders; above that, alternate


@dataclass(frozen=True)
class Choice:
    """The best element found and its total score.

    `index[space]` (*sizes of outer spaces, size): universe coordinate u takes the model's coordinate index[u].
    `sign[space]`: same shape, +1 and -1, for spaces of symmetry "signed" and "flip".
    """

    value: float = 0.0
    index: Mapping[str, Array] = field(default_factory=dict)
    sign: Mapping[str, Array] = field(default_factory=dict)

    def joined(self, other: "Choice") -> "Choice":
        """Both choices together (they are about different spaces)."""
        return Choice(self.value + other.value, {**self.index, **other.index}, {**self.sign, **other.sign})


def assign(score: Array, incumbent: Array | None = None) -> Array:
    """The permutation q, shape (d,), that maximises `sum(score[u, q[u]])` for `score` (d, d).

    Where every row has its maximum in a column of its own, that is the answer and no assignment problem is solved.
    `incumbent` (d,), by default the identity, wins ties. Raises ValueError for a score that is not finite.
    """
    rows = np.arange(len(score))
    incumbent = rows if incumbent is None else incumbent
    tie = _rounding(score)
    best = score.argmax(axis=1)
    best = np.where(score[rows, incumbent] >= score[rows, best] - tie, incumbent, best)
    if np.bincount(best, minlength=len(score)).max(initial=1) == 1 and np.isfinite(tie):
        return best
    cost = np.negative(score, dtype=np.float64)
    cost[rows, incumbent] -= tie
    chosen: Array = extension("scipy.optimize._lsap").linear_sum_assignment(cost)[1]
    return chosen


def best_element(spaces: Mapping[str, Space], scores: Scores, incumbent: Choice | None = None) -> Choice:
    """The element of the group over the spaces of `scores` that maximises the sum of its scores over all faces.

    Exact, except for coupled siblings with more than four coordinates each (see the module docstring).
    Raises ValueError for combinations of spaces that no oracle covers.
    """
    folded: dict[Segment, Array] = {}
    for face, score in scores.items():
        sizes = tuple(factor.size for factor in face)
        _add(folded, tuple(_sign_aware(spaces, factor) for factor in face), score.reshape(sizes + sizes))
    named = {name for face in folded for name in _spaces_of(face)}
    roots = [name for name in spaces if name in named and spaces[name].within not in named]
    return _solve_siblings(spaces, roots, folded, incumbent or Choice())


def _sign_aware(spaces: Mapping[str, Space], factor: Factor) -> Factor:
    """The factor, with `signed` true only where signs act: the space has them and the axis takes them."""
    assert factor.space is not None, "a face is made of spaces only"
    return replace(factor, signed=factor.signed and spaces[factor.space].symmetry in ("signed", "flip"))


def _rounding(score: Array) -> float:
    """Differences below this are noise of the dtype of `score`."""
    return float(np.finfo(score.dtype).eps * max(score.max(initial=0.0), -score.min(initial=0.0)))


def _solve_siblings(spaces: Mapping[str, Space], names: Sequence[str], scores: Scores, incumbent: Choice) -> Choice:
    """Solve spaces of one level: each on its own, those that share a face together."""
    total = Choice(value=sum(float(score) for face, score in scores.items() if not face))
    for component in _components(names, [face for face in scores if face]):
        own = {face: score for face, score in scores.items() if component & _spaces_of(face)}
        if len(component) == 1:
            choice = _solve_space(spaces, next(iter(component)), own, incumbent)
        else:
            choice = _solve_coupled(spaces, [name for name in names if name in component], own, incumbent)
        total = total.joined(choice)
    return total


def _components(names: Sequence[str], faces: Sequence[Segment]) -> Iterator[set[str]]:
    """Connected sets of `names`, two being connected when a face holds both."""
    left = list(names)
    while left:
        component = {left[0]}
        while True:
            touched = {n for face in faces if component & _spaces_of(face) for n in _spaces_of(face)}
            grown = component | (touched & set(names))
            if grown == component:
                break
            component = grown
        yield component
        left = [name for name in left if name not in component]


def _solve_space(spaces: Mapping[str, Space], name: str, scores: Scores, incumbent: Choice) -> Choice:
    """Solve one space and everything within it."""
    inner = [child for child in spaces if spaces[child].within == name and _occurs(child, scores)]
    if not inner:
        return _solve_leaf(spaces[name], scores, incumbent)
    if spaces[name].symmetry not in ("permutation", "fixed"):
        raise ValueError(f"space {name!r} has signs and spaces within it: no oracle covers that")
    sliced: dict[Segment, Array] = {}
    for face, score in scores.items():
        _add(sliced, _without(face, name), _pairs(face, score, name))
    rows = range(spaces[name].size)
    fixed = spaces[name].symmetry == "fixed"
    choices = {
        (u, a): _solve_siblings(spaces, inner, {face: score[u, a] for face, score in sliced.items()}, _at(incumbent, u))
        for u in rows
        for a in ([u] if fixed else rows)
    }
    if fixed:
        order = np.arange(spaces[name].size)
    else:
        values = np.array([[choices[u, a].value for a in rows] for u in rows])
        order = assign(values, incumbent.index.get(name))
    chosen = [choices[u, int(order[u])] for u in rows]
    index = {key: np.stack([choice.index[key] for choice in chosen]) for key in chosen[0].index}
    sign = {key: np.stack([choice.sign[key] for choice in chosen]) for key in chosen[0].sign}
    return Choice(sum(c.value for c in chosen), index if fixed else {name: order, **index}, sign)


def _solve_leaf(space: Space, scores: Scores, incumbent: Choice) -> Choice:
    """Solve a space with nothing within it. A score without a face is a constant and decides nothing."""
    scores = {face: score for face, score in scores.items() if face}
    if space.symmetry in ("signed", "flip"):
        return _solve_signs(space, scores, incumbent)
    score = _total(space.size, list(scores.values()))
    if space.symmetry == "fixed":
        return Choice(float(score.trace()))
    order = assign(score, incumbent.index.get(space.name))
    return Choice(_value(score, order), {space.name: order})


def _solve_signs(space: Space, scores: Scores, incumbent: Choice) -> Choice:
    """A leaf with signs: signed scores change their sign with the element's, plain scores do not."""
    signed = _total(space.size, [score for face, score in scores.items() if face[0].signed])
    plain = _total(space.size, [score for face, score in scores.items() if not face[0].signed])
    before = incumbent.index.get(space.name)
    old = incumbent.sign.get(space.name, np.ones(space.size, np.int8))
    if space.symmetry == "signed":
        score = np.abs(signed) + plain
        order = assign(score, before)
        chosen = signed[np.arange(space.size), order]
        sign = np.where(np.abs(chosen) <= _rounding(signed), old, np.where(chosen < 0, -1, 1))
        return Choice(_value(score, order), {space.name: order}, {space.name: sign.astype(np.int8)})
    both = []
    for flip in (old[0], -old[0]):
        score = plain + flip * signed
        order = assign(score, before)
        sign = np.full(space.size, flip, np.int8)
        both.append(Choice(_value(score, order), {space.name: order}, {space.name: sign}))
    return _better(both[0], both[1], scores)


def _solve_coupled(spaces: Mapping[str, Space], names: Sequence[str], scores: Scores, incumbent: Choice) -> Choice:
    """Solve siblings that meet on one axis: try orders of one of them, the pivot, and solve the rest for each."""
    leaves = [name for name in names if not any(space.within == name for space in spaces.values())]
    pivots = [name for name in leaves if spaces[name].symmetry == "permutation"]
    if not pivots:
        raise ValueError(f"spaces {', '.join(names)} share an axis, and none is a plain permutation")
    pivot = spaces[min(pivots, key=lambda name: spaces[name].size)]
    rest = [name for name in names if name != pivot.name]
    few = pivot.size <= MAX_ENUMERATED
    if not few and len(leaves) < len(names):
        raise ValueError(f"spaces {', '.join(names)} share an axis and are too large to enumerate")

    def given(order: Array) -> Choice:
        fixed = Choice(0.0, {pivot.name: order})
        return fixed.joined(_solve_siblings(spaces, rest, _contract([pivot.name], scores, fixed), incumbent))

    first = incumbent.index.get(pivot.name, np.arange(pivot.size))
    if few:
        starts = [first, *(np.array(order) for order in permutations(range(pivot.size)))]
    else:
        starts = [first, _solve_leaf(pivot, _contract(rest, scores, None), incumbent).index[pivot.name]]
    best = given(starts[0])
    for order in starts[1:]:
        best = _better(best, given(order), scores)
    while not few:
        order = _solve_leaf(pivot, _contract(rest, scores, best), best).index[pivot.name]
        better = _better(best, given(order), scores)
        if better is best:
            break
        best = better
    return best


def _contract(names: Sequence[str], scores: Scores, choice: Choice | None) -> Scores:
    """The scores left when the leaves `names` are held at `choice` (or, without one, left undecided: their mean)."""
    for name in names:
        held: dict[Segment, Array] = {}
        for face, score in scores.items():
            factor = next((factor for factor in face if factor.space == name), None)
            if factor is None:
                _add(held, face, score)
            else:
                left = np.tensordot(_matching(factor, choice), _pairs(face, score, name), axes=2)
                _add(held, _without(face, name), left)
        scores = held
    return scores


def _matching(factor: Factor, choice: Choice | None) -> Array:
    """The (size, size) matrix by which the scores of a factor are weighed."""
    name, size = factor.space, factor.size
    assert name is not None
    if choice is None:
        return np.full((size, size), 0.0 if factor.signed else 1 / size)
    matrix = np.zeros((size, size))
    sign = choice.sign.get(name) if factor.signed else None
    matrix[np.arange(size), choice.index[name]] = 1 if sign is None else sign
    return matrix


def _better(old: Choice, new: Choice, scores: Scores) -> Choice:
    """`new` only if it is better by more than rounding."""
    tie = max((_rounding(score) for score in scores.values()), default=0.0)
    return new if new.value > old.value + tie else old


def _add(scores: dict[Segment, Array], face: Segment, score: Array) -> None:
    """Add to the scores of a face."""
    scores[face] = scores[face] + score if face in scores else score


def _total(size: int, scores: Sequence[Array]) -> Array:
    """Sum of leaf scores, (size, size)."""
    if not scores:
        return np.zeros((size, size))
    return scores[0] if len(scores) == 1 else np.sum(scores, axis=0)


def _value(score: Array, order: Array) -> float:
    return float(score[np.arange(len(order)), order].sum(dtype=np.float64))


def _at(incumbent: Choice, row: int) -> Choice:
    """The incumbent of the spaces within coordinate `row` of their outer space."""
    return Choice(
        0.0,
        {name: index[row] for name, index in incumbent.index.items() if index.ndim > 1},
        {name: sign[row] for name, sign in incumbent.sign.items() if sign.ndim > 1},
    )


def _spaces_of(face: Segment) -> set[str]:
    return {factor.space for factor in face if factor.space is not None}


def _occurs(name: str, scores: Scores) -> bool:
    return any(name in _spaces_of(face) for face in scores)


def _without(face: Segment, name: str) -> Segment:
    return tuple(factor for factor in face if factor.space != name)


def _pairs(face: Segment, score: Array, name: str) -> Array:
    """Scores with the two axes of space `name` in front: (size, size, *rest of the face, *rest of the face)."""
    position = [factor.space for factor in face].index(name)
    return np.moveaxis(score, (position, len(face) + position), (0, 1))
