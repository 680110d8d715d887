"""Which methods to try first, and what speaks for each."""

import math
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from mergetool.analysis.advice import Advice, Adviser
from mergetool.analysis.measure import DIRECTIONS

_ALIKE = 0.6
"""Mean cosine of task vectors from which on they say the same."""
_APART = 0.1
_ENTANGLED = 2.0
"""Singular task interference, over what chance gives, that is worth removing."""
_LOW_RANK = 0.25
"""Effective rank over the number of directions."""
_CANCELS = 0.9
"""Share of the task vectors' mass that cancels, over what it would be of independent normal entries."""


def methods_to_try(adviser: Adviser) -> Iterator[Advice]:
    """At most a handful, for the models that belong here."""
    if any(each not in adviser.out for each in adviser.models) and not adviser.has_changes:
        yield from _without_base(adviser)
        return
    if len(adviser.left) < 2:
        return
    cosines = [adviser.whole.cosine(i, j) for i, j in combinations(adviser.left, 2)]
    known = [value for value in cosines if not math.isnan(value)]
    mean = sum(known) / len(known) if known else math.nan
    if mean >= _ALIKE:
        why = "the task vectors point the same way, so their mean loses little"
        yield _try("linear", why, {"cosine": mean}, f"mean cos(t_i, t_j) >= {_ALIKE}")
    elif abs(mean) <= _APART:
        why = "the task vectors are nearly orthogonal: a sum keeps each of them"
        yield _try("task-arithmetic", why, {"cosine": mean}, f"|mean cos(t_i, t_j)| <= {_APART}")
    if not adviser.out:  # signs and overlaps are those of all models
        yield from _by_signs(adviser)
        yield from _overlapping(adviser)
    yield from _low_rank(adviser)


def _without_base(adviser: Adviser) -> Iterator[Advice]:
    left = adviser.left
    kinship = [adviser.whole.kinship(i, j) for i, j in combinations(left, 2)]
    if len(left) == 2:
        why = "two relatives and no base: along the arc between them"
        yield _try("slerp", why, {"kinship": kinship[0]}, "two models, no base")
    elif len(left) > 2:
        why = "several relatives and no base: their mean on the sphere"
        yield _try("karcher", why, {"kinship": sum(kinship) / len(kinship)}, "more than two models, no base")


def _by_signs(adviser: Adviser) -> Iterator[Advice]:
    facts = adviser.whole.facts()
    chance = 1 - 1 / math.sqrt(len(adviser.models))
    if len(adviser.left) > 2 and facts["cancelled"] > _CANCELS * chance:
        evidence = {key: facts[key] for key in ("cancelled", "conflict", "conflict_by_chance")}
        yield _try(
            "ties",
            "much of the task vectors cancels, entry by entry; votes on signs keep the larger side",
            evidence,
            f"1 - sum |sum_i t_i| / sum_i sum |t_i| > {_CANCELS} (1 - 1/sqrt n)",
        )


def _overlapping(adviser: Adviser) -> Iterator[Advice]:
    figures, matrices = adviser.figures, adviser.figures.measured.matrices
    found, chance = figures.interference(matrices), sum(map(figures.chance, matrices)) / max(1, len(matrices))
    if found > _ENTANGLED * chance:
        yield _try(
            "tsv-merge",
            "the leading directions of the models' changes overlap; it makes them orthogonal first",
            {"interference": found, "by_chance": chance, "directions": DIRECTIONS},
            f"mean over matrices of ||(U^T U - I) S (V^T V - I)||_1 / sum S > {_ENTANGLED} x what chance gives",
        )


def _low_rank(adviser: Adviser) -> Iterator[Advice]:
    shares = [adviser.figures.median_of(i, lambda each: each.effective_rank / min(each.shape)) for i in adviser.left]
    if max(shares) < _LOW_RANK:
        yield _try(
            "iso-c",
            "the changes live in few directions, and the largest rule a sum; it evens them out",
            {"effective_rank_share": max(shares)},
            f"median over matrices of effective rank / min(m, n) < {_LOW_RANK} for every model",
        )


def _try(method: str, why: str, evidence: dict[str, Any], formula: str) -> Advice:
    return Advice("method", "hint", (), f"try {method}", why, evidence, formula, f"merge: {{method: {method}}}")
