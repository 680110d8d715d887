"""From answers to a few items, the score on all of them.

    mean       mean of the answers
    weighted   mean with the subset's weights
    p-irt      answers as they are, and for items not asked the chance of a right answer at the estimated ability
    mp-irt     the same, with the ability confined to what the abilities of the merged models span
    gp-irt     a blend of weighted and p-irt; gmp-irt, of weighted and mp-irt

The blend's weight comes from models whose score on all items is known, each held out of the fit that judges it: in a
fit that has seen a model, item response theory looks better than it is.

Reference: Polo et al., tinyBenchmarks, ICML 2024, https://arxiv.org/abs/2402.14992, section 3 (p-IRT, gp-IRT);
Mencattini et al., MERGE3, ICML 2025, https://arxiv.org/abs/2502.10436 (mp-IRT, gmp-IRT).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from mergetool.search.irt import Floats, IrtFit, abilities, fit, posterior_mode
from mergetool.search.subset import Subset

Kind = Literal["mean", "weighted", "p-irt", "mp-irt", "gp-irt", "gmp-irt"]
Span = Literal["linear", "affine"]

_SHRINK = 4.0
"""How many held-out models the belief in an even blend is worth."""
_FOLDS = 6


@dataclass(frozen=True)
class Estimate:
    """A score on all items, and how far off it may be (one standard error)."""

    value: float
    error: float


@dataclass(frozen=True)
class Estimator:
    """Estimates the mean over `num_items` items from answers to a subset."""

    kind: Kind
    subset: Subset
    num_items: int
    fit: IrtFit | None = None
    parents: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    """Abilities (K, D) of the models that are merged."""
    origin: Floats | None = None
    """Ability (D,) of their base, for an affine span."""
    span: Span = "linear"
    blend: float = 0.5
    """Share of the weighted mean in gp-irt and gmp-irt."""

    def __call__(self, answers: Floats) -> Estimate:
        """Answers (n,) to the subset's items, in their order.

        What was asked is known, so only the share `left` that was not asked can be wrong, and it alone has a variance.
        """
        n = len(answers)
        if n == self.num_items:
            return Estimate(float(answers.mean()), 0.0)
        left = 1.0 - n / self.num_items
        mean = float(answers.mean() if self.kind == "mean" else answers @ self.subset.weights)
        # Of n coins drawn from all without putting back, and one more, a fair coin: n right answers prove no certainty.
        spread = left * (n * mean * (1.0 - mean) + 0.25) / (n + 1.0) / n
        if self.kind in ("mean", "weighted"):
            return Estimate(mean, float(np.sqrt(max(spread, 0.0))))
        predicted, variance = self._predicted(answers)
        value = float(answers.mean()) * (1.0 - left) + left * predicted
        if self.kind in ("p-irt", "mp-irt"):
            return Estimate(value, float(np.sqrt(left**2 * variance)))
        share = self.blend
        # Both are told from the same answers, so their errors do not cancel: they add up, not their squares.
        joint = share * np.sqrt(max(spread, 0.0)) + (1.0 - share) * np.sqrt(left**2 * variance)
        return Estimate(share * mean + (1.0 - share) * value, float(joint))

    def _predicted(self, answers: Floats) -> tuple[float, float]:
        """Mean chance of a right answer over the items not asked, and the variance of that guess.

        Few answers say little about an ability of several dimensions. A merge lies near the models that it was made of:
        mp-irt looks for its place among them alone (weights of the parents' abilities, all equal until answers tell).
        """
        assert self.fit is not None
        bank = self.fit.items
        asked = bank.take(self.subset.items)
        others = bank.take(np.setdiff1d(np.arange(self.num_items), self.subset.items))
        if self.kind in ("p-irt", "gp-irt"):
            modes, precision = abilities(asked, answers[None])
            basis, origin = np.eye(bank.num_dimensions), np.zeros(bank.num_dimensions)
        else:
            basis, origin = self._basis()
            size = len(basis)
            modes, precision = posterior_mode(
                asked.discrimination @ basis.T,
                asked.discrimination @ origin - asked.difficulty,
                answers[None],
                mean=np.full(size, 1.0 / size),
                precision=np.eye(size),
            )
        chance = others.probability(origin + modes[0] @ basis)
        # Not knowing the ability (how much the mean follows it, times how well it is known), and what is chance anyway.
        slope = basis @ ((chance * (1.0 - chance)) @ others.discrimination) / len(chance)
        noise = float((chance * (1.0 - chance)).sum()) / len(chance) ** 2
        return float(chance.mean()), float(slope @ np.linalg.solve(precision[0], slope)) + noise

    def _basis(self) -> tuple[Floats, Floats]:
        """(vectors (K, D), origin (D,)) of the abilities that merges can have."""
        if self.span == "linear" or self.origin is None:
            return self.parents, np.zeros(self.parents.shape[1])
        return self.parents - self.origin, self.origin


def uses_irt(kind: Kind) -> bool:
    """Whether an estimator needs a fit."""
    return kind.endswith("irt")


def with_fit(estimator: Estimator, fitted: IrtFit, parents: Sequence[int], base: int | None) -> Estimator:
    """The estimator with this fit; `parents` and `base` are rows of the answers that were fitted."""
    origin = None if base is None else fitted.abilities[base]
    return replace(estimator, fit=fitted, parents=fitted.abilities[list(parents)], origin=origin)


@dataclass(frozen=True)
class CrossCheck:
    """How estimators did on models held out of the fit."""

    kind: Kind
    """What should be used."""
    blend: float
    errors: dict[str, float]
    """Mean absolute error by estimator."""
    ranks: dict[str, float]
    """Rank correlation of estimates with true scores, by estimator."""


def cross_check(
    estimator: Estimator,
    answers: Floats,
    *,
    parents: Sequence[int],
    base: int | None,
    num_dimensions: int,
    rng: np.random.Generator,
    judged: int | None = None,
) -> CrossCheck:
    """Try the estimator on calibration models (M, N) that its fit did not see, and settle the blend.

    A fit that has seen a model knows what it answered, so each is judged by a fit of the others.
    Parents and base are in every fit (their abilities span those of merges), and so are the rows from `judged` on:
    they are no merges. Where item response theory does not beat the weighted mean by 5 %, or ranks models worse by
    more than 0.03, the weighted mean is what should be used.
    """
    fixed = [*parents, *([base] if base is not None else []), *range(judged or len(answers), len(answers))]
    others = np.array([row for row in range(len(answers)) if row not in fixed], dtype=np.intp)
    if not uses_irt(estimator.kind) or len(others) < 4:
        return CrossCheck(estimator.kind, 0.5, {}, {})
    pure: Kind = "mp-irt" if "mp" in estimator.kind else "p-irt"
    truth, by_weight, by_irt = [], [], []
    for held in np.array_split(rng.permutation(others), min(_FOLDS, len(others))):
        kept = [*fixed, *(row for row in others if row not in held)]
        fitted = fit(answers[kept], num_dimensions)
        own_base = None if base is None else kept.index(base)
        trial = with_fit(estimator, fitted, [kept.index(parent) for parent in parents], own_base)
        for row in held:
            asked = answers[row, estimator.subset.items]
            truth.append(float(answers[row].mean()))
            by_weight.append(replace(trial, kind="weighted")(asked).value)
            by_irt.append(replace(trial, kind=pure)(asked).value)
    true, weighted, irt = (np.array(scores) for scores in (truth, by_weight, by_irt))
    blend = blend_of(weighted - true, irt - true)
    estimates = {"weighted": weighted, pure: irt, f"g{pure}": blend * weighted + (1.0 - blend) * irt}
    errors = {name: float(np.abs(guesses - true).mean()) for name, guesses in estimates.items()}
    ranks = {name: rank_correlation(guesses, true) for name, guesses in estimates.items()}
    wins = errors[estimator.kind] < 0.95 * errors["weighted"] and (ranks[estimator.kind] >= ranks["weighted"] - 0.03)
    return CrossCheck(estimator.kind if wins else "weighted", blend, errors, ranks)


def blend_of(weighted: Floats, irt: Floats) -> float:
    """The weighted mean's share in the blend with the smallest errors; near one half where models are few.

    Least squares over the held-out models, with as many made-up ones (`_SHRINK`) for which an even blend is right.
    """
    apart = weighted - irt
    pull = _SHRINK * float((apart**2).mean())
    if pull == 0.0:
        return 0.5
    share = (-float(apart @ irt) + 0.5 * pull) / (float(apart @ apart) + pull)
    return min(max(share, 0.0), 1.0)


def rank_correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Spearman's; 0 where one of them is constant."""
    if len(first) < 2 or np.ptp(first) == 0.0 or np.ptp(second) == 0.0:
        return 0.0
    return float(spearmanr(first, second).statistic)
