"""The plan of an adapter: what is changed of the base, as factors of every layer, or in full where there are none.

A tensor that is the base's own leaves nothing. How many directions there are, and what is changed at all, is only known
when the models are read; planned is what there is at most.

Reference: Hu et al., LoRA, https://arxiv.org/abs/2106.09685.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from mergetool.checkpoints.adapters.files import WEIGHTS_NAME
from mergetool.checkpoints.adapters.forms import Form, Part, forms_of, modules_of, plain_parts, problem
from mergetool.checkpoints.adapters.places import TASK_HEADS, leaf_of
from mergetool.errors import PlanError
from mergetool.planning.graph import BASE, Operand, Plan, Shard, Slot, Step
from mergetool.planning.operations import Pair
from mergetool.recipe.schema import Recipe
from mergetool.tensors.header import TensorSpec, lay_out
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import ModelSource


def as_adapter(plan: Plan) -> Plan:
    """The plan with steps that make factors. Raises PlanError for what an adapter of this base cannot hold."""
    base = plan.sources[BASE]
    held = [step for step in plan.steps if not _is_of_base(step)]
    if not held:
        raise PlanError("nothing of the base is changed", "plan", "name a model beside the base")
    shapes = {name: spec.shape for name, spec in base.specs.items()} | {step.name: step.spec.shape for step in held}
    parts = _parts(shapes, base)
    for step in held:
        _check(plan, step, problem(step.name, parts))
    names = [slot.spec.name for step in held for slot in step.slots if slot.spec.name in parts]
    every = forms_of(names, parts, shapes)
    plan = replace(plan, modules=modules_of(name for part in parts.values() for name in part.names))
    return _laid_out(plan, held, {step.name: _joined(step, every) for step in held})


def _parts(shapes: Mapping[str, tuple[int, ...]], base: ModelSource) -> dict[str, Part]:
    """What the tensors are in the base's network."""
    config = read_config(base.folder)
    if "architectures" not in config:
        return plain_parts(shapes)
    from mergetool.networks.modules import parts_of

    return parts_of(shapes, config, f"the base: {base.folder}")


def _joined(step: Step, forms: Mapping[str, Form]) -> Form:
    """The form of a tensor that has several names."""
    several = [forms[slot.spec.name] for slot in step.slots if slot.spec.name in forms]
    if len(several) > 1 and any(form.is_product for form in several):
        fix = f"keep the base's: overrides: [{{match: {step.name!r}, use: base}}], or write kind: checkpoint"
        raise PlanError("several layers share it, which an adapter changes one by one", step.name, fix)
    return replace(several[0], places=tuple(dict.fromkeys(place for form in several for place in form.places)))


def _laid_out(plan: Plan, held: Sequence[Step], forms: Mapping[str, Form]) -> Plan:
    steps = [_changed(plan.recipe, step, forms[step.name]) for step in held]
    shard = Shard(WEIGHTS_NAME, *lay_out([slot.spec for step in steps for slot in step.slots], {"format": "pt"}))
    placed = tuple(
        replace(step, index=index, slots=tuple(replace(slot, shard=0) for slot in step.slots))
        for index, step in enumerate(steps)
    )
    return replace(plan, steps=placed, shards=(shard,), bytes_at_most=shard.header.file_size, forms=forms)


def _is_of_base(step: Step) -> bool:
    """Whether a step only copies from the base. (PEFT looks for task heads in every adapter.)"""
    copied = not step.operation.arithmetic and all(each.source == BASE for each in step.models)
    return copied and leaf_of(step.name.rpartition(".")[0]) not in TASK_HEADS


def _check(plan: Plan, step: Step, why: str | None) -> None:
    fix = f"keep the base's: overrides: [{{match: {step.name!r}, use: base}}], or write kind: checkpoint"
    if why is not None:
        raise PlanError(f"an adapter cannot hold it: {why}", step.name, fix)
    known = plan.sources[BASE].specs.get(step.name)
    if known is not None and known.shape != step.spec.shape:
        what = f"it is {list(step.spec.shape)} in the result, {list(known.shape)} in the base"
        raise PlanError(f"{what}: an adapter cannot change sizes", step.name, fix)


def _changed(recipe: Recipe, step: Step, form: Form) -> Step:
    """A step whose slots are the two factors of what it changes, or the tensor by PEFT's names."""
    if not form.is_product:
        slots = tuple(Slot(replace(step.spec, name=place.key)) for place in form.places)
        return replace(step, slots=slots, work=step.spec)
    spec = step.spec
    rows, columns = spec.shape[0], prod(spec.shape[1:])
    outputs, inputs = (columns, rows) if form.turned else (rows, columns)
    keep = _keep(recipe)
    most = min(outputs, inputs, keep if isinstance(keep, int) else inputs)
    a = TensorSpec(form.a, spec.dtype, (most, inputs // prod(form.kernel), *form.kernel))
    b = TensorSpec(form.b, spec.dtype, (outputs, most, *(1 for _ in form.kernel)))
    whole = step.operation.granularity(spec) == "tensor"
    operation = Pair(step.operation, keep, most, form.turned, whole)
    return replace(step, slots=(Slot(a), Slot(b)), work=spec, operation=operation, base=Operand(BASE, step.name))


def _keep(recipe: Recipe) -> int | float | None:
    rank = recipe.output.rank
    if isinstance(rank, dict):
        return float(rank["energy"])
    return None if isinstance(rank, str) else rank
