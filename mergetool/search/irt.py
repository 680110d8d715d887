"""Item response theory: how hard items are, what they tell about models, and how able models are.

Model m answers item i rightly with probability `sigmoid(a_i . theta_m - b_i)`: an ability theta (D numbers), an item's
discrimination a (D numbers) and difficulty b (one number). Every fit here is a ridge logistic regression, solved by
Newton's method for many subjects at once: abilities given items, items given abilities, and both in turns. Priors keep
everything finite where a pattern of answers would send maximum likelihood to infinity (all right, all wrong, fewer
items than dimensions). Answers lie in [0, 1], fractions included (quasi-likelihood); NaN is an answer not given.

Reference: Reckase, Multidimensional Item Response Theory, 2009, chapter 4 (compensatory two-parameter model);
Polo et al., tinyBenchmarks, ICML 2024, https://arxiv.org/abs/2402.14992, section 3.
Parametrisations differ between programs, and mixing them gives wrong probabilities silently: `from_scalar_difficulty`
and `from_vector_difficulty` convert theirs to ours.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_NEWTON_STEPS = 60
_HALVINGS = 30
_LONGEST_STEP = 3.0
_GRADIENT = 1e-9
_ALTERNATIONS = 40
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class ItemBank:
    """Fitted items: discriminations (N, D) and difficulties (N,)."""

    discrimination: Floats
    difficulty: Floats

    @property
    def num_dimensions(self) -> int:
        return int(self.discrimination.shape[1])

    def probability(self, abilities: Floats) -> Floats:
        """Chance of a right answer: abilities (..., D) -> (..., N)."""
        return sigmoid(abilities @ self.discrimination.T - self.difficulty)

    def take(self, items: "NDArray[np.intp]") -> "ItemBank":
        """Some of the items."""
        return ItemBank(self.discrimination[items], self.difficulty[items])


@dataclass(frozen=True)
class IrtFit:
    """Items and the abilities (M, D) of the models they were fitted to; abilities have mean 0 and covariance 1."""

    items: ItemBank
    abilities: Floats
    objective: float


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)), without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)))


def from_scalar_difficulty(discrimination: Floats, difficulty: Floats) -> ItemBank:
    """Items of programs that compute `sum_d (a_d theta_d - b)`: their b (N,) counts D times."""
    return ItemBank(discrimination, discrimination.shape[1] * difficulty)


def from_vector_difficulty(discrimination: Floats, difficulty: Floats) -> ItemBank:
    """Items of programs that compute `sum_d a_d (theta_d - b_d)`: one difficulty per dimension, (N, D)."""
    return ItemBank(discrimination, np.asarray((discrimination * difficulty).sum(axis=1)))


def posterior_mode(
    design: Floats,
    offset: Floats,
    answers: Floats,
    *,
    mean: Floats,
    precision: Floats,
    start: Floats | None = None,
) -> tuple[Floats, Floats]:
    """Most probable coefficients of many logistic regressions on one design, under a normal prior.

    design (n, p), offset (n,), answers (B, n) in [0, 1] with NaN where there is none, prior mean (p,) and precision
    (p, p), optionally where to start (B, p). Returns coefficients (B, p) and the negative Hessians (B, p, p), which
    are the posterior's precision.
    """
    posterior = _Posterior(design, offset, answers, mean, precision)
    place = np.tile(mean, (len(answers), 1)) if start is None else start
    value = posterior.objective(place)
    for _ in range(_NEWTON_STEPS):
        gradient, hessian = posterior.slopes(place)
        if np.abs(gradient).max(initial=0.0) < _GRADIENT:
            break
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        step *= np.minimum(1.0, _LONGEST_STEP / np.maximum(np.linalg.norm(step, axis=1, keepdims=True), 1e-300))
        for _ in range(_HALVINGS):  # the objective is concave: a short enough step never makes it worse
            reached = posterior.objective(place + step)
            worse = reached < value - 1e-12 * np.abs(value)
            if not worse.any():
                break
            step[worse] *= 0.5
        place, value = place + step, reached
    return place, posterior.slopes(place)[1]


class _Posterior:
    """The logarithm of a posterior over coefficients (B, p), as `posterior_mode` climbs it."""

    def __init__(self, design: Floats, offset: Floats, answers: Floats, mean: Floats, precision: Floats) -> None:
        self._design, self._offset, self._mean, self._precision = design, offset, mean, precision
        self._given = ~np.isnan(answers)
        self._answers = np.where(self._given, answers, 0.0)
        self._products = (design[:, :, None] * design[:, None, :]).reshape(len(design), -1)

    def objective(self, place: Floats) -> Floats:
        """Values (B,), up to a constant."""
        logits = place @ self._design.T + self._offset
        likelihood = np.where(self._given, self._answers * logits - np.logaddexp(0.0, logits), 0.0).sum(axis=1)
        away = place - self._mean
        return np.asarray(likelihood - 0.5 * np.einsum("bp,pq,bq->b", away, self._precision, away))

    def slopes(self, place: Floats) -> tuple[Floats, Floats]:
        """Gradients (B, p) and negative Hessians (B, p, p)."""
        chance = sigmoid(place @ self._design.T + self._offset)
        missed = np.where(self._given, self._answers - chance, 0.0)
        gradient = missed @ self._design - (place - self._mean) @ self._precision
        curvature = np.where(self._given, chance * (1.0 - chance), 0.0) @ self._products
        return gradient, curvature.reshape(-1, *self._precision.shape) + self._precision


def abilities(items: ItemBank, answers: Floats, start: Floats | None = None) -> tuple[Floats, Floats]:
    """Most probable abilities under a N(0, 1) prior: answers (B, N) -> abilities (B, D), precisions (B, D, D)."""
    size = items.num_dimensions
    return posterior_mode(
        items.discrimination, -items.difficulty, answers, mean=np.zeros(size), precision=np.eye(size), start=start
    )


def fit(answers: Floats, num_dimensions: int) -> IrtFit:
    """Fit items and abilities to answers (M models, N items): maximum a posteriori, by turns. Deterministic.

    Priors: abilities N(0, 1), discriminations N((1, 0, ..., 0), 1), difficulties N(0, 2).
    """
    mean = np.zeros(num_dimensions + 1)
    mean[0] = 1.0
    precision = np.diag([*[1.0] * num_dimensions, 0.25])
    theta = _first_abilities(answers, num_dimensions)
    last = reached = -np.inf
    items: ItemBank | None = None
    for _ in range(_ALTERNATIONS):
        items = _items_given(theta, answers, mean, precision, items)
        theta, _ = abilities(items, answers, theta)
        reached = _objective(items, theta, answers, mean, precision)
        theta = _standardised(theta)
        if abs(reached - last) < _TOLERANCE * abs(reached):
            break
        last = reached
    whitened = theta @ _whitening(theta)
    items = _items_given(whitened, answers, mean, precision)
    return _oriented(items, whitened, reached)


def _first_abilities(answers: Floats, num_dimensions: int) -> Floats:
    """Leading left singular vectors of the centred answers, the first one pointing towards better models."""
    with np.errstate(invalid="ignore"):
        counts = np.maximum((~np.isnan(answers)).sum(axis=0), 1)
        centre = np.nansum(answers, axis=0) / counts
    filled = np.where(np.isnan(answers), centre, answers)
    left, _, _ = np.linalg.svd(filled - centre, full_matrices=False)
    start = np.zeros((len(answers), num_dimensions))
    start[:, : min(num_dimensions, left.shape[1])] = left[:, :num_dimensions] * np.sqrt(len(answers))
    for axis in range(num_dimensions):
        if start[:, axis] @ (filled.mean(axis=1) - filled.mean()) < 0:
            start[:, axis] *= -1.0
    return start


def _items_given(
    theta: Floats, answers: Floats, mean: Floats, precision: Floats, near: ItemBank | None = None
) -> ItemBank:
    """All items, fitted to known abilities. `near`: a fit to start from."""
    design = np.hstack([theta, -np.ones((len(theta), 1))])
    start = None if near is None else np.hstack([near.discrimination, near.difficulty[:, None]])
    columns, _ = posterior_mode(design, np.zeros(len(theta)), answers.T, mean=mean, precision=precision, start=start)
    return ItemBank(columns[:, :-1], columns[:, -1])


def _objective(items: ItemBank, theta: Floats, answers: Floats, mean: Floats, precision: Floats) -> float:
    logits = theta @ items.discrimination.T - items.difficulty
    given = ~np.isnan(answers)
    likelihood = np.where(given, np.where(given, answers, 0.0) * logits - np.logaddexp(0.0, logits), 0.0).sum()
    away = np.hstack([items.discrimination, items.difficulty[:, None]]) - mean
    return float(likelihood - 0.5 * (theta**2).sum() - 0.5 * np.einsum("np,pq,nq->", away, precision, away))


def _standardised(theta: Floats) -> Floats:
    """Mean 0 and variance 1 in every dimension; what items lose by that, their next fit gives back."""
    spread = theta.std(axis=0)
    return np.asarray((theta - theta.mean(axis=0)) / np.where(spread > 1e-8, spread, 1.0))


def _whitening(theta: Floats) -> Floats:
    """The matrix that gives centred abilities covariance 1 (directions without spread are left alone)."""
    values, vectors = np.linalg.eigh(theta.T @ theta / len(theta))
    scale = np.where(values > 1e-8, 1.0 / np.sqrt(np.maximum(values, 1e-8)), 1.0)
    return np.asarray((vectors * scale) @ vectors.T)


def _oriented(items: ItemBank, theta: Floats, objective: float) -> IrtFit:
    """Turned to the items' principal axes, every axis towards right answers: what rotations leave open is settled."""
    _, _, axes = np.linalg.svd(items.discrimination, full_matrices=False)
    turn = axes.T if len(axes) == items.num_dimensions else np.eye(items.num_dimensions)
    turned = items.discrimination @ turn
    signs = np.where(turned.sum(axis=0) < 0, -1.0, 1.0)
    return IrtFit(ItemBank(turned * signs, items.difficulty), (theta @ turn) * signs, objective)


def choose_dimensions(answers: Floats, rng: np.random.Generator, candidates: tuple[int, ...] = (1, 2, 3, 5)) -> int:
    """How many dimensions predict best: items of odd place, from answers to those of even place, of held-out models.

    Of several within one standard error the smallest. One, where models are fewer than 16.
    """
    num_models, num_items = answers.shape
    if num_models < 16:
        return 1
    sizes = [size for size in candidates if size <= max(1, num_models // 8)]
    even, odd = np.arange(0, num_items, 2), np.arange(1, num_items, 2)
    errors: dict[int, list[float]] = {size: [] for size in sizes}
    for held in np.array_split(rng.permutation(num_models), 5):
        kept = np.setdiff1d(np.arange(num_models), held)
        for size in sizes:
            items = fit(answers[kept], size).items
            places, _ = abilities(items.take(even), answers[np.ix_(held, even)])
            guess = items.take(odd).probability(places).mean(axis=1)
            errors[size] += list(np.abs(guess - np.nanmean(answers[np.ix_(held, odd)], axis=1)))
    means = {size: float(np.mean(missed)) for size, missed in errors.items()}
    best = min(sizes, key=lambda size: means[size])
    slack = float(np.std(errors[best]) / np.sqrt(len(errors[best])))
    return next(size for size in sizes if means[size] <= means[best] + slack)
