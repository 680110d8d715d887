"""Estimators on a matrix of real answers, many times over; and what happens to the count as pools and searches grow."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from mergetool.search import subset
from mergetool.search.estimate import Estimator, cross_check, rank_correlation, uses_irt, with_fit
from mergetool.search.irt import IrtFit, fit

from .answers import Matrix

_RERANKED = 5
KINDS = ("mean", "weighted", "p-irt", "mp-irt", "gp-irt", "gmp-irt")
SIZES = (10, 20, 50, 100)
CALIBRATION = 8
"""Merges that answer everything before a search of this study begins."""


def compare(matrix: Matrix, *, seeds: int, calibrations: Sequence[int]) -> list[dict[str, Any]]:
    """(error, rank correlation) against full evaluation, by merges that calibrate, size and estimator.

    Means over tasks and draws. The base, the models and some merges calibrate; of the others those are judged that no
    calibration uses.
    """
    rows = []
    most = min(answers.shape[1] for answers in matrix.answers.values())
    for calibration, size in product(calibrations, (size for size in SIZES if size <= most)):
        cells: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
        for (task, answers), seed in product(matrix.answers.items(), range(seeds)):
            rng = np.random.default_rng([seed, *task.encode()])
            order = matrix.num_known + rng.permutation(len(answers) - matrix.num_known)
            known = answers[[*range(matrix.num_known), *order[:calibration]]]
            tried = answers[order[max(calibrations) :]]
            for kind, cell in _once(known, tried, matrix.num_known, size, rng).items():
                cells[kind].append(cell)
        means = {kind: np.mean(part, axis=0).tolist() for kind, part in cells.items()}
        rows.append({"calibration": calibration, "items": size} | means)
    return rows


def _once(
    known: np.ndarray, tried: np.ndarray, num_known: int, size: int, rng: np.random.Generator
) -> dict[str, tuple[float, float]]:
    """(mean absolute error, rank correlation) of every estimator, for one draw of items."""
    truth = tried.mean(axis=1)
    parents, base = list(range(1, num_known)), 0
    blocks = subset.stratified(known, size, rng)
    irt = fit(known, 1)
    made = {}
    for kind in KINDS:
        chosen = subset.random(known.shape[1], size, rng) if kind == "mean" else blocks
        estimator = Estimator(kind, chosen, known.shape[1], span="affine")  # type: ignore[arg-type]
        if uses_irt(kind):  # type: ignore[arg-type]
            estimator = with_fit(estimator, irt, parents, base)
        if kind in ("gp-irt", "gmp-irt"):
            check = cross_check(estimator, known, parents=parents, base=base, num_dimensions=1, rng=rng)
            estimator = replace(estimator, blend=check.blend)
        values = np.array([estimator(row[chosen.items]).value for row in tried])
        made[kind] = (float(np.abs(values - truth).mean()), rank_correlation(values, truth))
    return made


def scaling(matrix: Matrix, *, seeds: int) -> list[dict[str, Any]]:
    """Searches simulated with the fitted model: items spent and score lost as pools and candidates grow.

    Items are drawn from the fitted ones. Candidates' abilities rise and draw together, as those of a search do: from
    N(0, 1), which is that of the merges, to N(1, 0.3). They are judged by the weighted mean of items stratified by
    the answers of base and models, and five of them are re-ranked.
    """
    bank = [fit(answers, 1) for answers in matrix.answers.values()]
    rows = []
    for num_items, num_candidates, size in (
        (500, 192, 20),
        (1000, 192, 20),
        (1000, 192, 50),
        (1000, 500, 20),
        (2000, 1000, 20),
        (5000, 1000, 20),
        (5000, 2000, 50),
        (10000, 2000, 50),
    ):
        lost = [
            _simulated(bank, matrix.num_known, num_items, num_candidates, size, np.random.default_rng(seed))
            for seed in range(seeds)
        ]
        spent = (matrix.num_known + _RERANKED) * num_items + num_candidates * size
        rows.append(
            {"pool": num_items, "candidates": num_candidates, "asked": size, "spent": spent}
            | {"full": num_candidates * num_items, "reduction": num_candidates * num_items / spent}
            | {"lost": float(np.mean(lost))}
        )
    return rows


def _simulated(
    bank: list[IrtFit], num_known: int, num_items: int, num_candidates: int, size: int, rng: np.random.Generator
) -> float:
    """Expected score (mean over tasks) lost by few items and re-ranking, against asking everybody everything."""
    few, full, true = np.zeros((3, num_candidates))
    for irt in bank:
        items = irt.items.take(rng.integers(0, len(irt.items.difficulty), num_items))
        progress = np.linspace(0.0, 1.0, num_candidates)[:, None]
        theta = progress + (1.0 - 0.7 * progress) * rng.normal(0.0, 1.0, (num_candidates, 1))
        known = rng.random((num_known, num_items)) < items.probability(rng.normal(0.0, 1.0, (num_known, 1)))
        chosen = subset.stratified(known.astype(float), size, rng)
        chance = items.probability(theta)
        answers = rng.random(chance.shape) < chance
        true += chance.mean(axis=1) / len(bank)
        full += answers.mean(axis=1) / len(bank)
        few += answers[:, chosen.items] @ chosen.weights / len(bank)
    best = np.argsort(-few)[:_RERANKED]
    return float(true[np.argmax(full)] - true[best[np.argmax(full[best])]])
