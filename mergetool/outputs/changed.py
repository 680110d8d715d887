"""How far a merge lies from what it was made of, role by role, for its card: estimated from a few entries.

A glance, not a measurement (that is `mergetool diff`): the reading costs a run some milliseconds whatever its size.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mergetool.checkpoints.view import RenamedModel
from mergetool.errors import SourceError
from mergetool.planning import Plan, Step
from mergetool.planning.graph import BASE, STORED, Operand
from mergetool.tensors.dtypes import DType, torch_dtype
from mergetool.tensors.io import bytes_of
from mergetool.tensors.source import ModelSource, SafetensorsSource

if TYPE_CHECKING:
    from torch import Tensor

_RUN, _RUNS = 4096, 2
"""Entries of a tensor that are looked at: some in a row, at some places."""
_TENSORS = 4
"""Tensors of one role that are looked at, evenly spaced over depth."""
_MODELS = 4


@dataclass(frozen=True)
class RoleChange:
    """All tensors of one role."""

    role: str
    tensors: int
    apart: Mapping[str, float]
    """Norm of the difference to a model, over the norm of that model."""


def changes_by_role(plan: Plan, folder: Path) -> list[RoleChange]:
    """What the weights in `folder` changed of the base, or of the models where there is none; most changed first."""
    names = [BASE] if BASE in plan.sources else list(plan.recipe.models)[:_MODELS]
    if plan.recipe.result != "checkpoint" or not all(_is_plain(plan.sources[name]) for name in names):
        return []
    try:
        with closing(SafetensorsSource([folder / shard.name for shard in plan.shards], folder)) as merged:
            found = [_of_role(role, steps, names, plan, merged) for role, steps in _roles(plan).items()]
    except SourceError:  # an input has gone since it was read: no reason to lose the result
        return []
    told = [each for each in found if each.apart]
    return sorted(told, key=lambda each: -max(each.apart.values()))


def _is_plain(source: ModelSource) -> bool:
    """Whether reading a few entries costs no more than that."""
    from mergetool.tensors.pickled import PickledSource

    while isinstance(source, RenamedModel):
        source = source.model
    return isinstance(source, SafetensorsSource | PickledSource)


def _is_wide(dtype: DType) -> bool:
    return dtype.name in ("F64", "F32", "F16", "BF16")


def _roles(plan: Plan) -> dict[str, list[Step]]:
    from mergetool.outputs.difference import layer_and_role

    roles: dict[str, list[Step]] = {}
    for step in plan.steps:
        if step.operation.arithmetic and step.work is None and _is_wide(step.slots[0].spec.dtype):
            roles.setdefault(layer_and_role(step.name)[1], []).append(step)
    return roles


def _of_role(role: str, steps: Sequence[Step], names: Sequence[str], plan: Plan, merged: ModelSource) -> RoleChange:
    chosen = [steps[place * len(steps) // min(len(steps), _TENSORS)] for place in range(min(len(steps), _TENSORS))]
    sums = {name: [0.0, 0.0] for name in names}
    for step in chosen:
        spec = step.slots[0].spec
        ours = _sample(merged, spec.name)
        for name, operand in _operands(step, names, plan):
            theirs = _sample(plan.sources[operand.source], operand.tensor)
            share = spec.num_elements / max(1, len(ours))
            sums[name][0] += share * _squares(ours - theirs)
            sums[name][1] += share * _squares(theirs)
    apart = {name: math.sqrt(off / whole) for name, (off, whole) in sums.items() if whole}
    return RoleChange(role, len(steps), {name: value for name, value in apart.items() if math.isfinite(value)})


def _operands(step: Step, names: Sequence[str], plan: Plan) -> Iterator[tuple[str, Operand]]:
    """Those of these models that lie on the result entry by entry."""
    for operand in step.operands:
        same = operand.view is STORED and plan.spec(operand).shape == step.slots[0].spec.shape
        if operand.source in names and same and _is_wide(plan.spec(operand).dtype):
            yield operand.source, operand


def _sample(source: ModelSource, name: str) -> "Tensor":
    """The same places of every tensor of a shape."""
    spec = source.specs[name]
    total = spec.num_elements
    if total <= _RUN * _RUNS:
        return _read(source, name, 0, total)
    starts = [place * (total - _RUN) // (_RUNS - 1) for place in range(_RUNS)]
    import torch

    return torch.cat([_read(source, name, start, _RUN) for start in starts])


def _read(source: ModelSource, name: str, start: int, count: int) -> "Tensor":
    import torch

    dtype = source.specs[name].dtype
    stored = torch.empty(count, dtype=torch_dtype(dtype))
    source.read_bytes(name, start * dtype.bits // 8, bytes_of(stored))
    return stored.float()


def _squares(values: "Tensor") -> float:
    return float(values.square().sum())  # not a product of vectors, for which threads are woken
