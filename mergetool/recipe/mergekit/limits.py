"""Numbers that mergekit takes and our methods refuse, as numbers that come to the same.

density 0     nothing of the model is kept: a weight of 0; where weights are averaged, and its own counts though
              nothing is left of it, a density that keeps nothing of any tensor
density > 1   all of it is kept: 1
gamma > 1     as 1: as many go as leave what is to be kept
less than the least of what a step, a tolerance or a number of steps can be: the least
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mergetool.methods import registry

_NOTHING = 1e-12
"""A density that keeps nothing, or of methods that keep the largest one entry of each tensor."""

_LEAST: Mapping[str, Mapping[str, float]] = {"nearswap": {"t": 0.0}, "karcher": {"max_iter": 0, "tol": 1e-300}}
"""Where mergekit takes less, and nothing more comes of it."""


class ByModel(dict[str, Any]):
    """A value for each model, by our names."""

    def plain(self, names: Sequence[str]) -> Any:
        """One value where all agree, else one for each of `names`; models that are elsewhere have no say."""
        first = next(iter(self.values()))
        if all(value == first for value in self.values()):
            return first
        return {name: self.get(name, first) for name in names}


def within_limits(values: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The same fields, with densities between 0 and 1, and nothing below its least."""
    least = _LEAST.get(method, {})
    values = {key: least[key] if _is_below(value, least.get(key)) else value for key, value in values.items()}
    if isinstance(gamma := values.get("gamma"), ByModel):
        values["gamma"] = ByModel({name: _at_most_one(value) for name, value in gamma.items()})
    density, weight = values.get("density"), values.get("weight")
    if not isinstance(density, ByModel) or not isinstance(weight, ByModel):
        return {**values, "density": _bounded(density)} if isinstance(density, int | float) else dict(values)
    kind = registry()[method]
    normalize = values.get("normalize", kind.model_fields["normalize"].default)
    counts = bool(normalize) and not getattr(kind, "votes", False)
    gone = [name for name, value in density.items() if not isinstance(value, dict) and value <= 0 and not counts]
    densities = {name: 1.0 if name in gone else _bounded(value) for name, value in density.items()}
    weights = {name: 0.0 if name in gone else value for name, value in weight.items()}
    return {**values, "density": ByModel(densities), "weight": ByModel(weights)}


def _is_below(value: Any, least: float | None) -> bool:
    return least is not None and isinstance(value, int | float) and value < least


def _bounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {"gradient": [_bounded(knot) for knot in value["gradient"]]}
    return min(value, 1.0) if value > 0 else _NOTHING


def _at_most_one(value: Any) -> Any:
    return value if isinstance(value, dict) else min(value, 1.0)
