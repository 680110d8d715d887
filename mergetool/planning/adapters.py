"""The plan of an adapter: what is changed of the base, as factors of every layer, or in full where there are none.

A tensor that is the base's own leaves nothing. How many directions there are, and what is changed at all, is only known
when the models are read; planned is what there is at most.

Reference: Hu et al., LoRA, https://arxiv.org/abs/2106.09685.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from mergetool.checkpoints.adapters import AdapterAlone
from mergetool.checkpoints.adapters.files import WEIGHTS_NAME
from mergetool.checkpoints.adapters.forms import Form, InMemory, form_at, forms_of, modules_of, plain_parts, problem
from mergetool.checkpoints.adapters.places import TASK_HEADS, leaf_of
from mergetool.checkpoints.adapters.written import About, about_together, task_of
from mergetool.errors import PlanError
from mergetool.methods.families.low_rank import HELD
from mergetool.methods.then.followed import Followed
from mergetool.planning.alone import sites_of
from mergetool.planning.graph import BASE, Operand, Plan, Shard, Slot, Step
from mergetool.planning.operations import Decompose, Operation
from mergetool.recipe.schema import Recipe
from mergetool.tensors.dtypes import BY_NAME
from mergetool.tensors.header import TensorSpec, lay_out
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import ModelSource, is_same_tensor

_FACTORS = 16
"""What merging factors holds at once, over their size in float32: in float64, turned, and what comes out."""
_ROWS = 1 << 21
"""Entries of products that are looked at together, and as many of what is sought in them."""
_TURNS, _PASSES, _WIDTH = 12, 12, 96
"""How often factors are turned, and how often and by how many directions products are searched, measured."""


def as_adapter(plan: Plan) -> Plan:
    """The plan with steps that make factors. Raises PlanError for what an adapter of this base cannot hold."""
    base = plan.sources[BASE]
    held = [step for step in plan.steps if not _is_of_base(step, _directions(plan, step))]
    if not held:
        raise PlanError("nothing of the base is changed", "plan", "name a model beside the base")
    shapes = {name: spec.shape for name, spec in base.specs.items()} | {step.name: step.spec.shape for step in held}
    parts = _parts(shapes, base)
    if not any(step.name in parts and parts[step.name].is_layer for step in held):
        held += _first_layer(plan.steps, parts)
    for step in held:
        _check(plan, step, problem(step.name, parts))
    apart = _names(plan.steps, parts)
    held = _with_modules(held, plan.steps, parts, forms_of(_names(held, parts), parts, shapes, apart))
    every = forms_of(_names(held, parts), parts, shapes, apart)
    forms = {step.name: _joined(step, every) for step in held}
    name, revision = _base_name(plan)
    about = About(
        name,
        revision,
        task_of(read_config(base.folder)),
        modules_of(name for part in parts.values() for name in part.names),
        whole=True,
        turned=any(form.turned for form in forms.values()),
    )
    return _laid_out(replace(plan, about=about), held, forms)


def _names(steps: Sequence[Step], parts: Mapping[str, InMemory]) -> list[str]:
    return [slot.spec.name for step in steps for slot in step.slots if slot.spec.name in parts]


def _with_modules(
    held: Sequence[Step], steps: Sequence[Step], parts: Mapping[str, InMemory], forms: Mapping[str, Form]
) -> list[Step]:
    """With all of every module that is kept in full: PEFT opens none that lacks one of its tensors."""
    places = [(form, place) for form in forms.values() for place in form.places]
    saved = tuple(f"{place.module}." for form, place in places if not form.holds_alone(place))
    inside = {name for name, part in parts.items() if any(each.startswith(saved) for each in part.names)}
    chosen = {step.name for step in held} | inside
    return [step for step in steps if step.name in chosen]


def _first_layer(steps: Sequence[Step], parts: Mapping[str, InMemory]) -> Sequence[Step]:
    """A layer that is as in the base: PEFT opens no adapter without factors, so that some of zeros are written."""
    return [step for step in steps if step.name in parts and parts[step.name].is_layer][:1]


def _base_name(plan: Plan) -> tuple[str | None, str | None]:
    """What the adapter calls its base, and the revision."""
    recipe, origin = plan.recipe, next(iter(plan.origins.get(BASE, ())), None)
    if recipe.output.base is not None or recipe.base is None:
        return recipe.output.base, None
    return (recipe.base.source, None) if origin is None or origin.repo is None else (origin.repo, origin.commit)


def of_adapters(plan: Plan, adapters: Mapping[str, AdapterAlone]) -> Plan:
    """The plan of adapters by themselves: what any of them changes, by the names that they have for it."""
    method, steps = plan.recipe.method, plan.recipe.then
    why = method.needs_weights()
    if why is None and steps:
        why = Followed(inner=method.kernel(), steps=steps).needs_weights()
    if why is not None:
        fix = "add base: MODEL and output: {kind: checkpoint}, or choose another method (mergetool methods)"
        raise PlanError(f"{method.method_name()} cannot merge adapters by themselves: {why}", "merge.method", fix)
    sites = sites_of(adapters)
    held = [step for step in plan.steps if not _is_of_base(step)]
    name, revision = _base_name(plan)
    settings = [adapter.settings for adapter in adapters.values()]
    name = name or next((each.made_for for each in settings if each.made_for), None)
    ties = [adapter.keeps_tied for adapter in adapters.values() if adapter.keeps_tied is not None]
    tied = bool(ties) and all(ties)
    about = about_together(settings, name, revision, read_config(plan.sources[BASE].folder), tied=tied)
    about = replace(about, modules=frozenset(site.module for site in sites.values()))
    warnings = (*plan.warnings, *_taken_as_they_are(plan, [step for step in held if sites[step.name].is_full]))
    plan = replace(plan, about=about, warnings=warnings)
    return _laid_out(plan, held, {step.name: form_at(sites[step.name]) for step in held})


def _taken_as_they_are(plan: Plan, full: Sequence[Step]) -> list[str]:
    """Values have no weights: what a base has is not known, so that nothing tells what was changed."""
    chosen = {each.match for each in plan.recipe.overrides if each.use is not None}
    names = [step.name for step in full if not any(fnmatchcase(step.name, match) for match in chosen)]
    if plan.recipe.base is not None or not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [
        f"{names[0]}{more}: held in full by one adapter, and taken as they are, whatever its weight; with base: MODEL"
        " and output: {kind: adapter} they are merged as changes of the base's"
    ]


def _parts(shapes: Mapping[str, tuple[int, ...]], base: ModelSource) -> dict[str, InMemory]:
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
    steps = [_changed(plan, step, forms[step.name]) for step in held]
    layout = lay_out([slot.spec for step in steps for slot in step.slots], {"format": "pt"})
    shard = Shard(WEIGHTS_NAME, *layout, sparse=isinstance(plan.recipe.output.rank, str | dict))
    placed = tuple(
        replace(step, index=index, slots=tuple(replace(slot, shard=0) for slot in step.slots))
        for index, step in enumerate(steps)
    )
    return replace(plan, steps=placed, shards=(shard,), bytes_at_most=shard.header.file_size, forms=forms)


def _is_of_base(step: Step, added: Sequence[int] | None = None) -> bool:
    """Whether a step leaves the base's tensor: copies it, or no model `added` to it.

    PEFT looks for task heads in every adapter.
    """
    copied = not step.operation.arithmetic and all(each.source == BASE for each in step.models)
    same = copied or (added is not None and not any(added))
    return same and leaf_of(step.name.rpartition(".")[0]) not in TASK_HEADS


def _check(plan: Plan, step: Step, why: str | None) -> None:
    like = _with_its_like(step.name)
    fix = f"keep the base's: overrides: [{{match: {like!r}, use: base}}], or write kind: checkpoint"
    if why is not None:
        raise PlanError(f"an adapter cannot hold it: {why}", step.name, fix)
    known = plan.sources[BASE].specs.get(step.name)
    if known is not None and known.shape != step.spec.shape:
        what = f"it is {list(step.spec.shape)} in the result, {list(known.shape)} in the base"
        raise PlanError(f"{what}: an adapter cannot change sizes", step.name, fix)


def _with_its_like(name: str) -> str:
    """What matches a tensor in all layers, and all of what it is an expert of."""
    head, mark, tail = re.sub(r"\.\d+\.", ".*.", name).partition(".experts.")
    return head + mark + ("*" if mark else tail)


def _changed(plan: Plan, step: Step, form: Form) -> Step:
    """A step whose slots are the two factors of what it changes, or the tensor by PEFT's names."""
    if not form.is_product:
        slots = tuple(Slot(replace(step.spec, name=place.key)) for place in form.places)
        return replace(step, slots=slots, work=step.spec)
    step = replace(step, work=step.spec, base=Operand(BASE, step.name))
    spec, keep = step.spec, _keep(plan.recipe)
    rows, columns = spec.shape[-2:] if form.experts > 1 else (spec.shape[0], prod(spec.shape[1:]))
    outputs, inputs = (columns, rows) if form.turned else (rows, columns)
    directions = _directions(plan, step)
    most = min(outputs, inputs, keep if isinstance(keep, int) else inputs)
    if directions is not None and step.operation.way(spec) != "product":
        most = max(1, min(most, _together(step, directions)))  # room for a direction of zeros: PEFT wants one
    else:
        _check_rank(plan, step, keep)
    a = TensorSpec(form.a, spec.dtype, (form.experts * most, inputs // prod(form.kernel), *form.kernel))
    b = TensorSpec(form.b, spec.dtype, (outputs, form.experts * most, *(1 for _ in form.kernel)))
    whole = step.operation.granularity(spec) == "tensor"
    known = directions is not None
    entries = 0 if directions is None else form.experts * (outputs + inputs) * sum(directions)
    operation = replace(
        Decompose(step.operation, keep, most, form.turned, whole, known, experts=form.experts, times=form.times),
        **_cost(step, entries, sum(directions)) if directions else {"flops": _flops(spec, keep)},
    )
    return replace(step, slots=(Slot(a), Slot(b)), operation=operation)


def _together(step: Step, directions: Sequence[int]) -> int:
    """Directions of the result at most, of models that add so many."""
    if step.operation.way(step.spec) != "halves":
        return sum(directions)
    ranks = sorted({count for count in directions if count})
    if len(ranks) > 1:
        what = f"adapters have the ranks {', '.join(map(str, ranks))} here, and their matrices cannot be added up"
        fix = f"choose merge: {{method: linear}} and output: {{rank: {ranks[-1]}}}"
        raise PlanError(what, step.name, fix)
    return max(directions)


def _cost(step: Step, entries: int, count: int) -> dict[str, Any]:
    """What it takes to merge factors of so many entries and directions."""
    operation, spec = step.operation, step.spec
    read, held, flops = entries * spec.dtype.bits // 8, 4 * _FACTORS * entries, _TURNS * entries * count
    if operation.way(spec) == "product":
        seen = spec.num_elements if operation.granularity(spec) == "tensor" else min(_ROWS, spec.num_elements)
        kept = spec.num_elements if spec.num_elements <= HELD else 0
        held += 4 * seen * operation.copies(len(step.models)) + 4 * kept
        flops += spec.num_elements * ((1 if kept else _PASSES) * count + _PASSES * _WIDTH)
    return {"bytes_read": read, "bytes_held": held, "flops": float(flops)}


def _flops(spec: TensorSpec, keep: int | float | None) -> float:
    """Multiply-adds for the leading directions of a matrix, or for all of them."""
    shorter = min(spec.shape[0], spec.num_elements // max(1, spec.shape[0]))
    return float(spec.num_elements * (min(3 * shorter, _PASSES * _WIDTH) if isinstance(keep, int) else 12 * shorter))


def _check_rank(plan: Plan, step: Step, keep: int | float | None) -> None:
    """Raise PlanError where a full matrix would be left of adapters without anybody having asked for it."""
    if keep is None and plan.recipe.output.rank is None:
        what = f"{step.operation.name} leaves a matrix of many directions, and an adapter keeps few"
        fix = "add output: {rank: 32}, or a share such as {rank: {energy: 0.99}}, or {rank: exact} for all of them"
        raise PlanError(what, step.name, fix)


def _directions(plan: Plan, step: Step) -> list[int] | None:
    """At most how many directions every model adds to the base; None where one is no sum of base and factors."""
    base = plan.sources[BASE]
    counts: list[int] = []
    for operand in step.models:
        source = plan.sources[operand.source]
        count = 0 if operand.source == BASE else source.num_directions(operand.tensor)
        beneath = operand.source == BASE or is_same_tensor(source.origin, base, operand.tensor)
        if count is None or not beneath:
            return None
        counts.append(count)
    alone = plan.recipe.adapters_alone
    return counts if alone or _is_relative(step.operation) else None


def _is_relative(operation: Operation) -> bool:
    """Whether a sum of base and factors is merged as the sum of the base and of what the factors come to."""
    if operation.method is None or operation.method.needs_base == "required":
        return True
    return operation.way(TensorSpec("", BY_NAME["F32"], ())) == "sum" and sum(operation.coefficients()) == 1.0


def _keep(recipe: Recipe) -> int | float | None:
    rank = recipe.output.rank
    if isinstance(rank, dict):
        return float(rank["energy"])
    return None if isinstance(rank, str) else rank
