"""The steps of a bundle of masks: the shared change, every task's mask of it, and directions that a router reads."""

from collections.abc import Sequence
from dataclasses import replace

from mergetool.bundle.masked import mask_spec, matrices_to_route, shared_spec
from mergetool.bundle.options import Options
from mergetool.bundle.ranks import factor_specs
from mergetool.bundle.task_vector import directions_of
from mergetool.kernels.spectral import rank_limit
from mergetool.planning.graph import Slot, Step
from mergetool.planning.operations import Mask
from mergetool.tensors.header import TensorSpec

Added = Sequence[int | None]
"""How many directions each expert's adapters add to a tensor; None where it must be read to tell."""


def masked_steps(merged: Sequence[tuple[Step, TensorSpec]], added: Sequence[Added], options: Options) -> list[Step]:
    """The steps whose slots are masks in the files of the tasks and, in the one after these, the shared change."""
    num_tasks = len(added[0]) if added else 0
    routed: tuple[str, ...] = ()
    if options.router is not None and num_tasks > 1:
        ranks = {
            spec.name: [1 if own is None else min(1, own) for own in each] for (_, spec), each in _pairs(merged, added)
        }
        routed = matrices_to_route(ranks, {spec.name: spec.shape for _, spec in merged}, options)
    return [
        _masked(step, spec, each, options, num_tasks, routed=spec.name in routed)
        for (step, spec), each in _pairs(merged, added)
    ]


def _pairs(
    merged: Sequence[tuple[Step, TensorSpec]], added: Sequence[Added]
) -> list[tuple[tuple[Step, TensorSpec], Added]]:
    return list(zip(merged, added, strict=True))


def _masked(step: Step, spec: TensorSpec, added: Added, options: Options, num_tasks: int, *, routed: bool) -> Step:
    changed = directions_of(added)
    slots: list[Slot] = []
    rank = rank_limit(options.rank, min(spec.shape), num_tasks) if routed else 0
    for shard, own in enumerate(added if changed != 0 else ()):
        slots.append(Slot(mask_spec(spec.name, spec.shape), shard))
        most = rank if own is None else min(rank, own)
        slots += [Slot(part, shard) for part in (factor_specs(spec.name, spec.shape, most, options) if most else ())]
    if slots:
        slots.append(Slot(shared_spec(spec.name, spec.shape, options), num_tasks))
    return replace(step, slots=tuple(slots), work=spec, operation=Mask(step.operation.models, rank, changed))
