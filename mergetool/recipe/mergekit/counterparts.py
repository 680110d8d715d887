"""Which of our methods stands for each of mergekit's, and what its parameters are called with us."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mergetool.recipe.mergekit.parameters import MergekitParameter


@dataclass(frozen=True)
class Counterpart:
    """Our method for one of mergekit's."""

    method: str
    base: Literal["ancestor", "optional", "member"]
    """What `base_model` is: the common ancestor of the models (which may be missing), or one of them (the first)."""
    parameters: Mapping[str, MergekitParameter]
    without_effect: tuple[str, ...] = ()
    """Parameters that mergekit accepts and that change no number."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Our fields for what mergekit always does."""


_WEIGHT = {"weight": MergekitParameter("weight", per_model=True)}
_DENSITY = {"density": MergekitParameter("density", 1.0, per_model=True)}
_LAMBDA = {"lambda": MergekitParameter("scale", 1.0)}
_AVERAGED = {"normalize": MergekitParameter("normalize", True)}
_RESCALED = {"rescale": MergekitParameter("rescale", True, words={True: "l1", False: "none"})}
_SPARSE = {"rescale": MergekitParameter("rescale", "none", words={True: "l1", False: "none"})}
_SUMMED = {"normalize": MergekitParameter("normalize", False)}
_GAMMA = {"gamma": MergekitParameter("gamma", 0.01, per_model=True)}
_BREADCRUMBS = _WEIGHT | _DENSITY | _GAMMA | _SUMMED | _SPARSE | _LAMBDA
_DELLA = _WEIGHT | _DENSITY | {"epsilon": MergekitParameter("epsilon", 0.15, per_model=True)} | _RESCALED | _LAMBDA
_EXACT = {"boundary": "random"}
"""Just the wanted number of entries is kept: of those that are equal, any."""
_DARE = _WEIGHT | _DENSITY | _SUMMED | _RESCALED | _LAMBDA

METHODS = {
    "linear": Counterpart("linear", "member", _WEIGHT | _AVERAGED),
    "passthrough": Counterpart("passthrough", "member", {"scale": MergekitParameter("scale", 1.0, per_model=True)}),
    "slerp": Counterpart("slerp", "member", {"t": MergekitParameter("t")}),
    "task_arithmetic": Counterpart(
        "task-arithmetic", "ancestor", _WEIGHT | _SUMMED | _LAMBDA, ("density", "rescale", "int8_mask")
    ),
    "ties": Counterpart("ties", "ancestor", _WEIGHT | _DENSITY | _AVERAGED | _SPARSE | _LAMBDA, ("int8_mask",), _EXACT),
    "breadcrumbs": Counterpart("breadcrumbs", "ancestor", _BREADCRUMBS, ("int8_mask",), _EXACT),
    "breadcrumbs_ties": Counterpart("breadcrumbs-ties", "ancestor", _BREADCRUMBS, ("int8_mask",), _EXACT),
    "della": Counterpart("della", "ancestor", _DELLA | _AVERAGED, ("int8_mask",)),
    "della_linear": Counterpart("della-linear", "ancestor", _DELLA | _SUMMED, ("int8_mask",)),
    "dare_linear": Counterpart("dare-linear", "ancestor", _DARE, ("int8_mask",)),
    "dare_ties": Counterpart("dare-ties", "ancestor", _DARE, ("int8_mask",)),
}
