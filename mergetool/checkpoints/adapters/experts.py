"""Mixtures of experts: adapters hold one pair of factors for all experts, files one tensor for each, or one for all.

transformers keeps the experts of a layer in two parameters, (experts, 2 x inner, hidden) and (experts, hidden, inner);
PEFT adapts such a parameter with A (rank x experts, in) and B (out, rank x experts), the experts' parts of A lying one
below the other, those of B interleaved. A few models store (experts, in, out). Files mostly hold every expert's gate,
up and down matrix alone; gate and up are then the upper and lower half of the first product.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mergetool.checkpoints.adapters.changes import Block
from mergetool.checkpoints.adapters.conv1d import model_types
from mergetool.checkpoints.adapters.places import Places
from mergetool.tensors.header import TensorSpec

FUSED = ("gate_up_proj", "down_proj", "up_proj")
"""What transformers calls the parameters that hold all experts of a layer."""
_GATES = ("gate_proj", "w1", "fc1")
_UPS = ("up_proj", "w3", "fc3")
_DOWNS = ("down_proj", "w2", "fc2")
_STORED_IN_OUT = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})
"""Model types whose parameters are (experts, in, out)."""


def is_in_out(shape: tuple[int, ...], size_in: int, size_out: int, config: Mapping[str, Any]) -> bool | None:
    """Whether a parameter of this shape is (experts, in, out); None if factors of these sizes do not fit it."""
    fits, fits_other = shape[1:] == (size_out, size_in), shape[1:] == (size_in, size_out)
    if fits and fits_other:
        return any(kind in _STORED_IN_OUT for kind in model_types(config))
    return fits_other if fits or fits_other else None


def separate(
    module: str, size_in: int, size_out: int, places: Places, specs: Mapping[str, TensorSpec]
) -> Iterator[tuple[str, Block, str]]:
    """(tensor, its place in the product, the parameter's name) for experts that the file stores one by one."""
    experts = places.experts(module)
    count = len(experts)
    if sorted(experts) != list(range(count)):
        return
    for index, parts in experts.items():
        gate, up, down = (_part(parts, names) for names in (_GATES, _UPS, _DOWNS))
        if gate and up and _fits(specs[gate], 2, size_out, size_in) and specs[gate].shape == specs[up].shape:
            yield gate, Block(count, index, 0), "gate_up_proj"
            yield up, Block(count, index, size_out // 2), "gate_up_proj"
        elif down and _fits(specs[down], 1, size_out, size_in):
            yield down, Block(count, index, 0), "down_proj"
        elif up and not gate and _fits(specs[up], 1, size_out, size_in):
            yield up, Block(count, index, 0), "up_proj"


def _part(parts: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((parts[name] for name in names if name in parts), None)


def _fits(spec: TensorSpec, halves: int, size_out: int, size_in: int) -> bool:
    return len(spec.shape) == 2 and (spec.shape[0] * halves, spec.shape[1]) == (size_out, size_in)
