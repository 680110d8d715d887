"""What a recipe's own numbers come to: whether its sum of task vectors is long enough, and not too long."""

import math
from collections.abc import Iterator

import numpy as np

from mergetool.analysis.advice import Advice, Adviser
from mergetool.methods.base import TensorMethod
from mergetool.recipe.schema import Recipe

_NOTHING = 0.05
_TOO_MUCH = 3.0


def coefficients_of(recipe: Recipe) -> tuple[float, ...] | None:
    """What a recipe multiplies each task vector by, halfway up the network; None for methods that are no sums, and
    where steps follow.

    Any method that is told to multiply by 0 is a sum of nothing.
    """
    method = recipe.method
    if method.searches or recipe.then or not isinstance(method, TensorMethod):
        return None
    params = method.params(0.5, tuple(recipe.models))
    if method.problem(params) is not None:
        return None
    if method.in_factors("", (2, 2)) == "sum":
        return method.coefficients(params)
    weights = vars(params).get("weight", (1.0,))
    is_nothing = vars(params).get("scale", 1.0) == 0 or (isinstance(weights, tuple) and not any(weights))
    return (0.0,) * len(recipe.models) if is_nothing else None


def words_about_numbers(adviser: Adviser) -> Iterator[Advice]:
    """Where the merged change is next to nothing, or several times as long as what the models changed."""
    factors, gram = adviser.coefficients, adviser.whole.gram
    mean, whole = float(np.sqrt(np.diag(gram)).mean()), math.sqrt(max(0.0, float(gram.sum())))
    if factors is None or not adviser.based or not mean or not whole:
        return
    length = math.sqrt(max(0.0, float(np.array(factors) @ gram @ np.array(factors)))) / mean
    little = length < _NOTHING
    if not little and (length <= _TOO_MUCH or adviser.out):  # who does not belong may be the length
        return
    yield Advice(
        "numbers",
        "problem" if little else "warning",
        (),
        "the recipe's numbers leave little but the base" if little else "the recipe's numbers overshoot",
        f"the merged change is {length:.2g} times as long as what the models changed on average",
        {"length": length, "factors": list(factors)},
        f"||sum_i c_i t_i|| / mean_i ||t_i||, c_i: weight times scale; {_NOTHING} to {_TOO_MUCH:g} is usual",
        f"merge: {{method: task-arithmetic, scale: {mean / whole:.2g}}}",
    )
