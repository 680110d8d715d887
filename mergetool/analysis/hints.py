"""Numbers to begin with: weights, scale, density, dtype."""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

import numpy as np

from mergetool.analysis.advice import Advice, Adviser
from mergetool.kernels.differences import ratio
from mergetool.kernels.task_vectors import Array, SliceSums, energies_in_largest
from mergetool.pages.cells import share

_DOMINATES = 0.8
_ENERGY = 0.9
_GRID = np.arange(1, 101) / 100
"""Densities that are tried."""
_LOST = 0.5


def hints(adviser: Adviser) -> Iterator[Advice]:
    """For the models that belong here."""
    for rule in (_dominates, _dtype, _scale, _density):
        yield from rule(adviser)


def _dominates(adviser: Adviser) -> Iterator[Advice]:
    left = adviser.left
    norms2 = {i: adviser.whole.gram[i, i] for i in left}
    whole = sum(norms2.values())
    if not adviser.has_changes or len(left) < 2 or not whole:
        return
    for i in left:
        if norms2[i] / whole < _DOMINATES:
            continue
        others = [math.sqrt(norms2[j]) for j in left if j != i]
        model, even = adviser.models[i], median(others) / math.sqrt(norms2[i])
        shares = {name: round(even, 2) if name == model else 1.0 for name in adviser.models if name not in adviser.out}
        yield Advice(
            "dominates",
            "warning",
            (model,),
            f"{model} dominates",
            f"its task vector is {1 / even:.3g} times as long as the median of the others: the merge is little else",
            {"share_of_norms": norms2[i] / whole, "norm": math.sqrt(norms2[i]), "others": others},
            f"||t_i||^2 / sum_j ||t_j||^2 >= {_DOMINATES}; even weight: median_j ||t_j|| / ||t_i||",
            f"merge: {{method: task-arithmetic, weight: {_mapping(shares)}}}",
        )


def _mapping(values: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {value:g}" for name, value in values.items()) + "}"


def _scale(adviser: Adviser) -> Iterator[Advice]:
    """A window for the factor on the sum of task vectors."""
    gram, left = _gram(adviser), adviser.left
    if not adviser.has_changes or len(left) < 2 or (whole := float(gram.sum())) <= 0:
        return
    own, with_sum = np.diag(gram), gram.sum(1)
    kept = [float(a / b) for a, b in zip(own, with_sum, strict=True) if b > 0]
    if not kept:
        return
    low, high = float(np.sqrt(own).mean() / math.sqrt(whole)), median(kept)
    low, high = sorted((min(low, 1.5), min(high, 1.5)))
    yield Advice(
        "scale",
        "hint",
        (),
        f"scale about {low:.2g}" if f"{low:.2g}" == f"{high:.2g}" else f"scale between {low:.2g} and {high:.2g}",
        "at the one end the merged change is as long as the models' are on average; at the other the median model "
        "finds its own change in full in it",
        {"from": low, "to": high, "start": round((low + high) / 2, 2)},
        "mean_i ||t_i|| / ||sum_j t_j||; median_i ||t_i||^2 / <t_i, sum_j t_j>",
        f"merge: {{method: task-arithmetic, scale: {(low + high) / 2:.2g}}}",
    )


def _gram(adviser: Adviser) -> Array:
    gram: Array = adviser.whole.gram[np.ix_(adviser.left, adviser.left)]
    return gram


def _density(adviser: Adviser) -> Iterator[Advice]:
    """How few entries hold most of a change."""
    if not adviser.has_changes or not adviser.left:
        return
    tallies = [each.in_full() for each in adviser.figures.measured.tallies.values()]
    needed = {adviser.models[i]: _density_in_tensors(tallies, i) for i in adviser.left}
    known = {model: value for model, value in needed.items() if value is not None}
    if not known:
        return
    density = min(1.0, math.ceil(round(20 * max(known.values()), 9)) / 20)
    yield Advice(
        "density",
        "hint",
        (),
        f"density {density:g}",
        f"so many of the entries of each tensor hold {share(_ENERGY)} of every task vector's squared norm; fewer cut "
        "into them",
        {"by_model": known},
        f"smallest d whose largest d entries of each tensor hold {_ENERGY} of ||t_i||^2, the most of all models, "
        "rounded up to 0.05",
        f"merge: {{method: ties, density: {density:g}}}",
    )


def _density_in_tensors(tallies: Sequence[SliceSums], i: int) -> float | None:
    """What a method that trims tensor by tensor must keep of a task vector; None of one that is zero."""
    held = np.zeros(len(_GRID))
    for each in tallies:
        if own := float(each.gram[i + 1, i + 1]):
            held += own * np.nan_to_num(energies_in_largest(each.drawn.magnitudes[i], each.entries, _GRID), nan=1.0)
    return float(_GRID[np.argmax(held >= _ENERGY * held[-1])]) if held[-1] else None


def _dtype(adviser: Adviser) -> Iterator[Advice]:
    """Changes that bfloat16 cannot hold."""
    drawn = adviser.whole.tally.drawn
    if not adviser.based or not drawn.touched:
        return
    survives, error = drawn.survived / drawn.touched, ratio(drawn.lost2, drawn.mean2)
    if error <= _LOST:
        return
    yield Advice(
        "dtype",
        "warning",
        (),
        "the mean of the models hardly survives bfloat16",
        f"{share(survives)} of the entries that it changes are still changed once stored in bfloat16, and rounding "
        f"adds an error of {error:.2f} times the change",
        {"survives_bfloat16": survives, "error_bfloat16": error},
        f"||bf16(w) - w|| / ||w - w_base|| > {_LOST}, w the mean of the models",
        "output: {dtype: float32}",
    )
