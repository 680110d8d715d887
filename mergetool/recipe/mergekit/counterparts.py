"""Which of our methods stands for each of mergekit's, and what its parameters are called with us."""

from collections.abc import Callable, Mapping
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
    settle: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    """Makes our fields of those that were read, where several parameters are one field with us."""


_WEIGHT = {"weight": MergekitParameter("weight", per_model=True)}
_DENSITY = {"density": MergekitParameter("density", 1.0, per_model=True)}
_LAMBDA = {"lambda": MergekitParameter("scale", 1.0)}
_AVERAGED = {"normalize": MergekitParameter("normalize", True)}
_RESCALED = {"rescale": MergekitParameter("rescale", True, words={True: "l1", False: "none"})}
_SPARSE = {"rescale": MergekitParameter("rescale", False, words={True: "l1", False: "none"})}
_SUMMED = {"normalize": MergekitParameter("normalize", False)}
_GAMMA = {"gamma": MergekitParameter("gamma", 0.01, per_model=True)}
_BREADCRUMBS = _WEIGHT | _DENSITY | _GAMMA | _SUMMED | _SPARSE | _LAMBDA
_DELLA = _WEIGHT | _DENSITY | {"epsilon": MergekitParameter("epsilon", 0.15, per_model=True)} | _RESCALED | _LAMBDA
_EXACT = {"boundary": "random"}
"""Just the wanted number of entries is kept: of those that are equal, any."""
_SCE = {"select_topk": MergekitParameter("density", 1.0)}
_NEARSWAP = {"t": MergekitParameter("t")}
_RAM = {"epsilon": MergekitParameter("epsilon", 1e-5)}
_RAMPLUS = _RAM | {"r": MergekitParameter("r", 0.1), "alpha": MergekitParameter("alpha", 0.2)}
_NUSLERP = {
    "nuslerp_flatten": MergekitParameter("per", True, words={True: "tensor", False: "row"}),
    "nuslerp_row_wise": MergekitParameter("columns", False),
}
_MULTISLERP = _WEIGHT | {"normalize_weights": MergekitParameter("normalize", True)}
_KARCHER = {"max_iter": MergekitParameter("max_iter", 10), "tol": MergekitParameter("tol", 1e-5)}
_FILTER_WISE = {"filter_wise": MergekitParameter("per", False, words={True: "row", False: "tensor"})}


def _nuslerp(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """What mergekit calls rows are the columns of a matrix, and they only count where nothing is flattened."""
    values = dict(values)
    if values.pop("columns", False) and values.get("per") == "row":
        values["per"] = "column"
    return values


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
    "nuslerp": Counterpart("nuslerp", "optional", _WEIGHT | _NUSLERP, settle=_nuslerp),
    "multislerp": Counterpart("multislerp", "optional", _MULTISLERP, ("eps",)),
    "karcher": Counterpart("karcher", "member", _KARCHER),
    "model_stock": Counterpart("model-stock", "ancestor", _FILTER_WISE, constants={"clamp": False}),
    "sce": Counterpart("sce", "ancestor", _SCE, ("int8_mask",), {"negligible": 1e-6}),
    "nearswap": Counterpart("nearswap", "ancestor", _NEARSWAP, constants={"limit": "absolute"}),
    "arcee_fusion": Counterpart("arcee-fusion", "ancestor", {}),
    "ram": Counterpart("ram", "ancestor", _RAM),
    "ramplus_tl": Counterpart("ramplus-tl", "ancestor", _RAMPLUS),
    "dare_linear": Counterpart("dare-linear", "ancestor", _DARE, ("int8_mask",)),
    "dare_ties": Counterpart("dare-ties", "ancestor", _DARE, ("int8_mask",)),
}
