"""The plan of a bundle: what is kept of every tensor, and the files that will lie in it.

How many directions there are to keep is only known when the models are read; planned is what there is at most.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from mergetool.bundle.files import factors_path, model_files, small_files
from mergetool.bundle.options import Options
from mergetool.bundle.present import PresentedSource
from mergetool.bundle.ranks import bytes_within, factor_specs, full_spec, most_directions
from mergetool.methods.base import expect
from mergetool.methods.families.bundle import BundleMethod
from mergetool.planning.graph import BASE, Plan, PlannedFile, Shard, Slot, Step
from mergetool.planning.operations import Factorise
from mergetool.tensors.header import TensorSpec, lay_out


def as_bundle(plan: Plan) -> Plan:
    """The plan with steps that make factors instead of merging, and the files of a bundle."""
    options = expect(plan.recipe.method, BundleMethod).options()
    tasks = tuple(plan.recipe.models)
    steps = [
        _factorised(step, slot.spec, options, tasks)
        for step in plan.steps
        if step.operation.arithmetic
        for slot in step.slots
    ]
    shards = [_shard(index, task, steps) for index, task in enumerate(tasks)]
    kept = tuple(replace(step, index=index) for index, step in enumerate(steps))
    others = tuple(_others(plan, options, steps))
    return replace(
        plan,
        steps=kept,
        shards=tuple(shards),
        beside=others,
        bytes_at_most=_factor_bytes(plan, options, steps, shards) + sum(each.size for each in others),
    )


def _factorised(step: Step, spec: TensorSpec, options: Options, tasks: tuple[str, ...]) -> Step:
    """The step whose slots are the factors of all tasks, each task's in a file of its own."""
    rank = most_directions(spec.name, spec.shape, options, len(tasks))
    specs = factor_specs(spec.name, spec.shape, rank, options) if rank else [full_spec(spec.name, spec.shape, options)]
    slots = tuple(Slot(spec, shard) for shard in range(len(tasks)) for spec in specs)
    return replace(step, slots=slots, work=spec, operation=Factorise(step.operation.models, rank))


def _shard(index: int, task: str, steps: Iterable[Step]) -> Shard:
    specs = [slot.spec for step in steps for slot in step.slots if slot.shard == index]
    return Shard(factors_path(task), *lay_out(specs, {"format": "pt"}))


def _factor_bytes(plan: Plan, options: Options, steps: Iterable[Step], shards: Iterable[Shard]) -> int:
    """Bytes of all files of factors together, when directions of least energy are left out beyond `size`."""
    most, least = 0, 0
    for slot, rank in ((slot, step.operation.numbers.get("rank", 1)) for step in steps for slot in step.slots):
        most += slot.spec.num_bytes
        least += slot.spec.num_bytes // max(1, rank)
    base = sum(spec.num_bytes for spec in plan.sources[BASE].specs.values())
    return sum(each.header.file_size for each in shards) - most + bytes_within(options, base, most, least)


def _others(plan: Plan, options: Options, steps: Iterable[Step]) -> Iterable[PlannedFile]:
    """The base, the heads, and what a router reads; not the few small files that are written new."""
    base = plan.sources[BASE]
    if options.base == "copy":
        whole = base.model if isinstance(base, PresentedSource) else base
        yield from _copies("base", model_files(whole), {stamp.path: stamp.size for stamp in whole.files})
    for task in plan.recipe.models:
        source = plan.sources[task]
        if isinstance(source, PresentedSource) and source.head is not None:
            place = f"heads/{quote(task, safe='')}"
            own = [source.head.source.specs[name] for name in source.head.names]
            yield PlannedFile(f"{place}/head.safetensors", _size(own))
            yield from _copies(place, small_files(source.head.folder), {})
    if options.router is not None and options.router.features == "merged":
        read = [replace(step.spec, dtype=base.specs[step.name].dtype) for step in steps]
        yield PlannedFile("first_pass.safetensors", _size(read), at_most=True)


def _copies(place: str, files: Mapping[str, Path], known: Mapping[Path, int]) -> Iterable[PlannedFile]:
    """Files that are copied. Weights may not be here yet, but their sizes are `known` from their headers."""
    for name, path in files.items():
        if path in known or path.is_file():
            yield PlannedFile(f"{place}/{name}", known[path] if path in known else path.stat().st_size)


def _size(specs: Iterable[TensorSpec]) -> int:
    return lay_out(list(specs), {"format": "pt"})[1].file_size
