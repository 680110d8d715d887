"""mergekit recipes as ours: what people have already written runs as it is, with mergekit's numbers.

A YAML file with `merge_method:` is one. Its settings become fields of our method; what varies by tensor becomes
overrides. Where the two differ:

    precedence    model > slice > whole recipe; a list of filters in which none matches falls through to the next
    filter        a substring of the tensor's name: the glob `*text*`. Several parameters with different filters
                  become overrides for every way these can fall together, in an order where the first match is right
    gradient      a list along depth; tensors outside the layers take its first value in both
    base_model    the common ancestor, except for slerp (the model at t = 0) and linear (one more model)
    dtype         storage of the result; arithmetic is in float32 even where mergekit would compute in 16 bits
    paths         relative to the current folder

Whatever has no counterpart is refused with the line it stands on; nothing is silently left out.

Reference: mergekit 0.1.5, https://github.com/arcee-ai/mergekit, whose outputs tests/peers holds this to.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

_REQUIRED: Any = object()
_MAX_CASES = 256


@dataclass(frozen=True)
class _Parameter:
    """One parameter of a mergekit method: our field, mergekit's default, and whether it is a model's own."""

    field: str
    default: Any = _REQUIRED
    per_model: bool = False


@dataclass(frozen=True)
class _Counterpart:
    """Our method for one of mergekit's."""

    method: str
    base: Literal["ancestor", "member"]
    """What `base_model` is: the common ancestor, or one of the merged models (the first)."""
    parameters: Mapping[str, _Parameter]
    without_effect: tuple[str, ...] = ()
    """Parameters that mergekit accepts and that change no number."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ours that mergekit has no parameter for."""


_WEIGHT = {"weight": _Parameter("weight", per_model=True)}
_DENSITY = {"density": _Parameter("density", 1.0, per_model=True)}
_LAMBDA = {"lambda": _Parameter("scale", 1.0)}


def _normalize(default: bool) -> dict[str, _Parameter]:
    return {"normalize": _Parameter("normalize", default)}


_METHODS = {
    "linear": _Counterpart("linear", "member", _WEIGHT | _normalize(True)),
    "passthrough": _Counterpart(
        "linear", "member", {"scale": _Parameter("weight", 1.0, per_model=True)}, constants={"normalize": False}
    ),
    "slerp": _Counterpart("slerp", "member", {"t": _Parameter("t")}),
    "task_arithmetic": _Counterpart(
        "task-arithmetic", "ancestor", _WEIGHT | _normalize(False) | _LAMBDA, ("density", "rescale", "int8_mask")
    ),
    "ties": _Counterpart("ties", "ancestor", _WEIGHT | _DENSITY | _normalize(True) | _LAMBDA, ("int8_mask",)),
    "dare_linear": _Counterpart(
        "dare-linear", "ancestor", _WEIGHT | _DENSITY | _normalize(False) | _LAMBDA, ("int8_mask",)
    ),
    "dare_ties": _Counterpart(
        "dare-ties", "ancestor", _WEIGHT | _DENSITY | _normalize(False) | _LAMBDA, ("int8_mask",)
    ),
}
