"""The plan of a bundle: what is kept of every tensor, and the files that will lie in it.

How many directions there are to keep is only known when the models are read; planned is what there is at most.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from mergetool.bundle.around import check_own, is_own, whole_of
from mergetool.bundle.compared import compared_specs, most_compared
from mergetool.bundle.files import (
    COMPARED,
    SHARED,
    SPECTRA,
    factors_path,
    model_files,
    small_files,
    spectrum_key,
    triplet_names,
)
from mergetool.bundle.manifest import AROUND, MASKED
from mergetool.bundle.masked import matrices_to_route
from mergetool.bundle.options import Options
from mergetool.bundle.present import PresentedSource
from mergetool.bundle.ranks import bytes_within, factor_specs, full_spec, most_directions
from mergetool.bundle.task_vector import directions_of
from mergetool.methods.base import expect
from mergetool.methods.families.bundle import BundleMethod
from mergetool.planning.graph import BASE, Plan, PlannedFile, Shard, Slot, Step
from mergetool.planning.masks import masked_steps
from mergetool.planning.operations import Factorise, Merged
from mergetool.tensors.dtypes import BY_NAME
from mergetool.tensors.header import TensorSpec, lay_out
from mergetool.tensors.source import SINGLE_NAME, is_same_tensor


def as_bundle(plan: Plan) -> Plan:
    """The plan with steps that make factors instead of merging, and the files of a bundle."""
    options = expect(plan.recipe.method, BundleMethod).options()
    tasks = tuple(plan.recipe.models)
    merged = [(step, slot.spec) for step in plan.steps if step.operation.arithmetic for slot in step.slots]
    files = [factors_path(task) for task in tasks]
    if options.kind in MASKED:
        steps = masked_steps(merged, [_added(plan, step, tasks) for step, _ in merged], options)
        files.append(SHARED)
    else:
        check_own([spec.name for _, spec in merged], options)
        steps = [_kept(plan, step, spec, options) for step, spec in merged]
    shards = [_shard(index, path, steps) for index, path in enumerate(files)]
    kept = tuple(replace(step, index=index) for index, step in enumerate(steps))
    others = tuple(_others(plan, options, steps))
    return replace(
        plan,
        steps=kept,
        shards=tuple(shards),
        beside=others,
        bytes_at_most=_factor_bytes(plan, options, steps, shards) + sum(each.size for each in others),
    )


def _kept(plan: Plan, step: Step, spec: TensorSpec, options: Options) -> Step:
    """The step that keeps what experts changed of a tensor, or merges it into the base."""
    if not is_own(spec.name, options):
        return replace(step, slots=(), work=spec, operation=Merged(step.operation.models, 0))
    return _factorised(step, spec, options, _added(plan, step, tuple(plan.recipe.models)))


def _added(plan: Plan, step: Step, tasks: Sequence[str]) -> list[int | None]:
    """How many directions every task's adapters add to the base's tensor; None where it must be read to tell."""
    base = plan.sources[BASE]
    sources = {name: plan.sources[each.source] for name, each in zip(step.operation.models, step.models, strict=True)}
    return [
        0
        if (source := sources.get(task, base)) is base
        else source.num_directions(step.name)
        if is_same_tensor(source.origin, base, step.name)
        else None
        for task in tasks
    ]


def _factorised(step: Step, spec: TensorSpec, options: Options, added: Sequence[int | None]) -> Step:
    """The step whose slots are the factors of all tasks, each task's in a file of its own."""
    changed = directions_of(added)
    rank = most_directions(spec.name, spec.shape, options, len(added), changed)
    slots = [
        Slot(part, shard)
        for shard, own in enumerate(added)
        for part in ([] if changed == 0 else _parts(spec, rank, own, options))
    ]
    operation = Factorise(step.operation.models, rank, changed)
    return replace(step, slots=tuple(slots), work=spec, operation=operation)


def _parts(spec: TensorSpec, rank: int, added: int | None, options: Options) -> list[TensorSpec]:
    """What one task's file holds of a tensor."""
    if not rank:
        return [full_spec(spec.name, spec.shape, options)]
    own = rank if added is None else min(rank, added)
    return factor_specs(spec.name, spec.shape, own, options) if own else []


def _shard(index: int, path: str, steps: Iterable[Step]) -> Shard:
    specs = [slot.spec for step in steps for slot in step.slots if slot.shard == index]
    return Shard(path, *lay_out(specs, {"format": "pt"}))


def _factor_bytes(plan: Plan, options: Options, steps: Iterable[Step], shards: Iterable[Shard]) -> int:
    """Bytes of all files of factors together, when directions of least energy are left out beyond `size`."""
    most, least = 0, 0
    for slot, rank in ((slot, step.operation.numbers.get("rank", 1)) for step in steps for slot in step.slots):
        most += slot.spec.num_bytes
        least += slot.spec.num_bytes // max(1, rank)
    within = bytes_within(options, plan.sources[BASE].specs.values(), most, least)
    return sum(each.header.file_size for each in shards) - most + within


def _others(plan: Plan, options: Options, steps: Iterable[Step]) -> Iterable[PlannedFile]:
    """The base, the heads, and what a router reads; not the few small files that are written new."""
    base = plan.sources[BASE]
    if options.kind in AROUND:
        whole = whole_of(base)
        yield PlannedFile(f"base/{SINGLE_NAME}", _size(whole.specs.values()))
        yield from _copies("base", small_files(whole.folder) if whole.folder is not None else {}, {})
    elif options.base == "copy":
        whole = whole_of(base)
        yield from _copies("base", model_files(whole), {stamp.path: stamp.size for stamp in whole.files})
    for task in plan.recipe.models:
        source = plan.sources[task]
        if isinstance(source, PresentedSource) and source.head is not None:
            place = f"heads/{quote(task, safe='')}"
            own = [source.head.source.specs[name] for name in source.head.names]
            yield PlannedFile(f"{place}/head.safetensors", _size(own))
            yield from _copies(place, small_files(source.head.folder), {})
    if options.size is not None:
        kept = [(slot, step) for step in steps for slot in step.slots if slot.spec.name == triplet_names(step.name)[1]]
        values = [
            TensorSpec(spectrum_key(slot.shard, step.name), BY_NAME["F64"], (step.operation.numbers["rank"],))
            for slot, step in kept
        ]
        yield PlannedFile(SPECTRA, _size(values), at_most=True)
    if options.router is not None and options.router.rank is not None and len(plan.recipe.models) > 1:
        yield PlannedFile(COMPARED, _size(_compared(plan, options, steps)), at_most=True)
    if options.router is not None and options.router.features == "merged":
        read = [replace(step.spec, dtype=base.specs[step.name].dtype) for step in steps]
        yield PlannedFile("first_pass.safetensors", _size(read), at_most=True)


def _compared(plan: Plan, options: Options, steps: Iterable[Step]) -> list[TensorSpec]:
    """What a router compares, at most."""
    shapes = {step.name: step.spec.shape for step in steps}
    ranks = {step.name: [step.operation.numbers.get("rank", 0)] * len(plan.recipe.models) for step in steps}
    read = matrices_to_route(ranks, shapes, options)
    most = {name: (shapes[name], [most_compared(shapes[name], options)] * len(ranks[name])) for name in read}
    return compared_specs(most, options)


def _copies(place: str, files: Mapping[str, Path], known: Mapping[Path, int]) -> Iterable[PlannedFile]:
    """Files that are copied. Weights may not be here yet, but their sizes are `known` from their headers."""
    for name, path in files.items():
        if path in known or path.is_file():
            yield PlannedFile(f"{place}/{name}", known[path] if path in known else path.stat().st_size)


def _size(specs: Iterable[TensorSpec]) -> int:
    return lay_out(list(specs), {"format": "pt"})[1].file_size
