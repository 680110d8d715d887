"""The plan of an adapter: what is changed of the base, as factors of every layer, or in full where there are none.

A linear layer or a convolution becomes `lora_A` and `lora_B`. What has a row for every token, norms, and heads are kept
in full (`modules_to_save` in PEFT's words), and so are biases. A tensor that is the base's own leaves nothing. How many
directions there are, and what is changed at all, is only known when the models are read; planned is what there is at
most.

Reference: Hu et al., LoRA, https://arxiv.org/abs/2106.09685; names and files as PEFT writes them.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from mergetool.arch.matrices import is_matrix
from mergetool.checkpoints.adapters.conv1d import is_transposed
from mergetool.checkpoints.adapters.files import WEIGHTS_NAME
from mergetool.checkpoints.adapters.keys import PREFIX, unwrapped
from mergetool.checkpoints.vocabulary_axes import axes_of
from mergetool.errors import PlanError
from mergetool.planning.graph import BASE, Operand, Plan, Shard, Slot, Step
from mergetool.planning.operations import Pair
from mergetool.recipe.schema import Recipe
from mergetool.tensors.header import TensorSpec, lay_out
from mergetool.tensors.side_files import read_config

_CONVOLUTION = 4
"""Axes of the weights that PEFT factorises beside matrices; one that sees single channels stays as it is."""


def as_adapter(plan: Plan) -> Plan:
    """The plan with steps that make factors. Raises PlanError for what an adapter of this base cannot hold."""
    base = plan.sources[BASE]
    words, config = axes_of(base), read_config(base.folder)
    steps = []
    for step in plan.steps:
        if _is_of_base(step):
            continue
        _check_shape(plan, step)
        factorised = step.name not in words and _is_layer(step.name, step.spec.shape)
        steps.append(_pair(plan.recipe, step, config) if factorised else step)
    if not steps:
        raise PlanError("nothing of the base is changed", "plan", "name a model beside the base")
    layers = {_module(step.name) for step in steps if is_product(step)}
    steps = [step if is_product(step) else _in_full(step, layers) for step in steps]
    shard = Shard(WEIGHTS_NAME, *lay_out([slot.spec for step in steps for slot in step.slots], {"format": "pt"}))
    kept = tuple(
        replace(step, index=index, slots=tuple(replace(slot, shard=0) for slot in step.slots))
        for index, step in enumerate(steps)
    )
    return replace(plan, steps=kept, shards=(shard,), bytes_at_most=shard.header.file_size)


def _is_of_base(step: Step) -> bool:
    return not step.operation.arithmetic and all(each.source == BASE for each in step.models)


def _check_shape(plan: Plan, step: Step) -> None:
    known = plan.sources[BASE].specs.get(step.name)
    if known is not None and known.shape != step.spec.shape:
        what = f"it is {list(step.spec.shape)} in the result, {list(known.shape)} in the base"
        fix = f"write kind: checkpoint, or keep the base's: overrides: [{{match: {step.name!r}, use: base}}]"
        raise PlanError(f"{what}: an adapter cannot change sizes", step.name, fix)


def _is_layer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a layer that has low-rank adapters."""
    if not name.endswith(".weight") or not is_matrix(name, shape, "llm", conv="matricize"):
        return False
    return len(shape) == 2 or (len(shape) == _CONVOLUTION and shape[1] > 1)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def is_product(step: Step) -> bool:
    """Whether the slots of a step of an adapter are factors."""
    return step.work is not None


def module_of(key: str) -> str:
    """The module that a tensor of an adapter is of, by its name in the file."""
    module = _module(key.removeprefix(PREFIX))
    return unwrapped(module.removesuffix(".lora_A").removesuffix(".lora_B").removesuffix(".base_layer"))


def _pair(recipe: Recipe, step: Step, config: Mapping[str, Any]) -> Step:
    """A step whose slots are the two factors of what it changes."""
    spec, module = step.spec, _module(step.name)
    turned = len(spec.shape) == 2 and is_transposed(module, spec.shape, spec.shape, config, flag=False)  # type: ignore[arg-type]
    rows, columns = spec.shape[0], prod(spec.shape[1:])
    outputs, inputs = (columns, rows) if turned else (rows, columns)
    keep = _keep(recipe)
    most = _most(keep, outputs, inputs)
    kernel = spec.shape[2:]
    a = TensorSpec(f"{PREFIX}{module}.lora_A.weight", spec.dtype, (most, inputs // prod(kernel), *kernel))
    b = TensorSpec(f"{PREFIX}{module}.lora_B.weight", spec.dtype, (outputs, most, *(1 for _ in kernel)))
    whole = step.operation.granularity(spec) == "tensor"
    operation = Pair(step.operation, keep, most, turned, whole)
    return replace(step, slots=(Slot(a), Slot(b)), work=spec, operation=operation, base=Operand(BASE, step.name))


def _keep(recipe: Recipe) -> int | float | None:
    rank = recipe.output.rank
    if isinstance(rank, dict):
        return float(rank["energy"])
    return None if isinstance(rank, str) else rank


def _most(keep: int | float | None, outputs: int, inputs: int) -> int:
    """Directions to make room for; more than a matrix has, or (by share) than it is smaller with, never pay."""
    most = min(outputs, inputs)
    if isinstance(keep, int):
        return min(keep, most)
    return most if keep is None else max(1, min(most, outputs * inputs // (outputs + inputs)))


def _in_full(step: Step, layers: Collection[str]) -> Step:
    """A step whose tensor is called as PEFT calls what is kept in full."""
    return replace(step, slots=tuple(Slot(replace(slot.spec, name=_key(slot.spec.name, layers))) for slot in step.slots))


def _key(name: str, layers: Collection[str]) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{leaf}" if module in layers else f"{PREFIX}{name}"
