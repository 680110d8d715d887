"""What is measured on several models at once, while they are merged tensor by tensor: in memory, before the merge."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergetool.methods.base import TensorGroup
from mergetool.networks.running import read_tensor
from mergetool.planning.graph import BASE, Operand, Plan, Step
from mergetool.planning.operations import Merge
from mergetool.statistics.measure import Measuring
from mergetool.statistics.store import content_of
from mergetool.tensors.dtypes import BY_TORCH_NAME, torch_dtype

CPU = torch.device("cpu")


def joint_key(plan: Plan, asked: Mapping[str, Measuring], model: str) -> str:
    """SHA-256 of all that decides what is measured on one of several models: all of them, and how they are merged."""
    each = {name: one.key() for name, one in asked.items()}
    merges = (step for step in plan.steps if isinstance(step.operation, Merge))
    steps = [[step.name, step.operation.name, dict(step.operation.numbers), step.reads] for step in merges]
    copies = [[step.name, step.reads] for step in plan.steps if not isinstance(step.operation, Merge)]
    base = content_of(plan.sources[BASE]) if any(step.base for step in plan.steps) else []
    facts = [each, steps, copies, base, model]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


class PlanMerger:
    """Makes tensors of the result by the steps of a plan, without the steps that come after a merge."""

    def __init__(self, plan: Plan, device: torch.device = CPU) -> None:
        """`device`: where tensors are merged."""
        self._plan, self._device = plan, device
        self._dtype = torch_dtype(BY_TORCH_NAME[plan.recipe.compute.dtype])
        self._steps = {slot.spec.name: step for step in plan.steps for slot in step.slots}

    def merged(self, name: str, found: Mapping[str, Tensor]) -> Tensor | None:
        """A whole tensor, by what was found of each model for it; None for one that the result does not have."""
        step = self._steps.get(name)
        if step is None or not step.spec.dtype.is_float:
            return None
        tensors = [self._read(operand) for operand in step.models]
        if not isinstance(step.operation, Merge):
            return tensors[0]
        return self._merge(step, step.operation, tensors, found)

    @property
    def names(self) -> list[str]:
        """The tensors of the result; of those that are the same one, the first."""
        return [step.slots[0].spec.name for step in self._plan.steps]

    def task_vectors(self, name: str) -> tuple[Tensor, dict[str, Tensor]] | None:
        """A tensor of the base, and what every model changed of it; None for one that is not merged by a statistic."""
        step = self._steps[name]
        if step.base is None or not step.statistics:
            return None
        base = self._read(step.base)
        return base, {operand.source: self._read(operand).sub_(base) for operand in step.models}

    def _read(self, operand: Operand) -> Tensor:
        return read_tensor(self._plan.sources[operand.source], operand.tensor).to(self._device, self._dtype)

    def _merge(self, step: Step, operation: Merge, tensors: list[Tensor], found: Mapping[str, Tensor]) -> Tensor:
        names = [operand.source for operand in step.models]
        known = bool(step.statistics) and all(name in found for name in names)
        method = operation.method.alone() if known or not step.statistics else operation.method.alone().unmeasured()
        turned = self._is_turned(step)
        group = TensorGroup(
            step.key,
            step.spec.shape,
            operation.models,
            None,
            tensors,
            seed=self._plan.seed,
            measured=_Found([found[name].to(self._device) for name in names], turned) if known else None,
        )
        return method.merge(group, operation.params, {})

    def _is_turned(self, step: Step) -> bool:
        from mergetool.planning.measures import StatisticSource

        sources = [(self._plan.sources[each.source], each.tensor) for each in step.statistics[:1]]
        return any(isinstance(source, StatisticSource) and name in source.form.turned for source, name in sources)


@dataclass(frozen=True)
class _Found:
    """What was measured of one tensor of each model."""

    tensors: list[Tensor]
    turned: bool

    def of(self, place: int) -> Tensor:
        return self.tensors[place]

    def size(self, place: int) -> float:
        return float(self.tensors[place].double().square().mean().sqrt())

    def of_base(self) -> Tensor | None:
        return None
