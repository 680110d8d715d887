"""What a run will cost: workers, peak memory, disk. From the plan alone, so that it can be refused before it starts."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from mergetool.errors import OutputError, PlanError, at
from mergetool.planning.graph import KEPT_BYTES, SLICE_ELEMENTS, Plan, Step
from mergetool.planning.inner import bytes_on_disk, needed
from mergetool.planning.measures import to_measure
from mergetool.units import filesize, memsize

RUNTIME_BYTES = 300_000_000
"""Python and torch themselves, measured on Linux with a CPU build of torch."""
_NETWORK_BYTES = 200_000_000
"""transformers, and a network without its weights, where the plan asks it for modules."""
_DEVICE_BYTES = 600_000_000
"""Of the host's, for a device's libraries: a guess on the safe side."""
_HELD_STATISTICS = 40
"""Bytes for each element of a Gram matrix: in compute dtype, and four times in float64."""
_HELD_TOGETHER, _TOGETHER = 16, 8
"""Bytes for each element of the Gram matrices of so many models on a device: each twice, in float64."""
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
_SPARE = 64_000_000
"""Headers, journal, thread stacks, fragmentation."""


@dataclass(frozen=True)
class Costs:
    """Figures for people and for the scheduler, in bytes."""

    workers: int
    peak_memory: int
    step_memory: int
    """What all tensors that must be held whole may take together."""
    bytes_in: int
    bytes_out: int
    device: str = "cpu"
    """Where the arithmetic is done."""
    why: str = ""
    """What was expected there and elsewhere, where there was a choice."""
    room: int = 0
    """What a network that is measured may take."""
    seconds: float | None = None
    """What the chosen one should take, by rates measured here."""


def step_memory(plan: Plan, step: Step, *, on_device: bool = False) -> int:
    """Bytes that a step holds beyond a worker's buffers: whole tensors where a method must see them whole.

    A device looks at several matrices at once.
    """
    if step.operation.bytes_held is not None:
        return step.operation.bytes_held
    held = min(step.row, max(1, step.spec.num_elements))
    if held <= SLICE_ELEMENTS:
        return 0
    moved = sum(operand.view.granularity != "element" for operand in step.operands)  # stored, and as the view shows it
    copies = step.operation.copies(len(step.reads)) + moved
    copies *= 1 + len(step.partners)
    together = _memory_together(step) if on_device and step.granularity == "tensor" else 0
    return held * plan.compute_bits // 8 * copies + _statistics_memory(plan, step) + together


def _memory_together(step: Step) -> int:
    """Gram matrices of as many models as are looked at together, and what a search makes of them."""
    rows = step.spec.shape[0]
    shorter = min(rows, step.spec.num_elements // rows) * (1 + len(step.partners))
    return _HELD_TOGETHER * min(len(step.models), _TOGETHER) * shorter**2


def _statistics_memory(plan: Plan, step: Step) -> int:
    """What a method of matrices of another shape holds of them: one as it is read, and sums and factors in float64."""
    each = [plan.spec(operand) for operand in step.statistics]
    return max((_HELD_STATISTICS * spec.num_elements for spec in each if spec.shape != step.spec.shape), default=0)


def bytes_per_element(plan: Plan, *, on_device: bool = False) -> int:
    """What one element of every slice takes in a worker's buffers. A device has all operands there at once."""
    streams = max(
        (len(step.reads) if on_device else step.operation.streams(len(step.reads)) for step in plan.steps), default=1
    )
    temporaries = max((step.operation.buffers for step in plan.steps), default=0)
    return plan.compute_bits // 8 * (streams + temporaries + 2) + 8


def kept_bytes(plan: Plan) -> int:
    """What a worker keeps of the tensors that it reads again."""
    stored = (plan.bytes_read(step, step.spec.num_elements) for step in plan.steps if step.is_visited)
    return min(KEPT_BYTES, max(stored, default=0))


def estimate(
    plan: Plan, *, workers: int | None, memory: int | None, processes: int = 1, pinned: int | None = None
) -> Costs:
    """Settle workers and memory of one process. Raises PlanError when even one worker needs more than `memory`.

    Recipes inside run before, one by one: the one that needs most tells the peak.

    `memory` (and the machine's, and its cores) are shared by as many `processes` as run on this machine. On a device
    every worker has so many bytes of `pinned` memory beside its buffers, which small tensors are merged in.
    """
    inner = []
    for name, each in needed(plan):
        with at(name):
            inner.append(_estimate(each, workers, memory, processes, pinned))
    own = _estimate(plan, workers, memory, processes, pinned)
    peak = max(each.peak_memory for each in (own, *inner))
    return replace(own, peak_memory=peak, bytes_in=sum(each.bytes_in for each in (own, *inner)))


def _estimate(plan: Plan, workers: int | None, memory: int | None, processes: int, pinned: int | None) -> Costs:
    """The costs of a plan by itself."""
    memory = memory // processes if memory is not None else None
    one = SLICE_ELEMENTS * bytes_per_element(plan) + kept_bytes(plan) + (pinned or 0)
    whole = sorted((step_memory(plan, step) for step in plan.steps), reverse=True)
    largest = whole[0] if whole else 0
    fixed = RUNTIME_BYTES + _SPARE + plan.words.memory + (_NETWORK_BYTES if plan.about.modules else 0)
    fixed += 0 if pinned is None else _DEVICE_BYTES
    budget = memory if memory is not None else int(0.8 * available_memory()) // processes
    cores = len(os.sched_getaffinity(0))
    count = workers or max(1, min(cores, 32) // processes)
    count = max(1, min(count, (budget - fixed - largest) // one if budget > fixed + largest else 1))
    if memory is not None and fixed + one + largest > memory:
        worst = max(plan.steps, key=lambda step: step_memory(plan, step))
        raise PlanError(
            f"needs {_gib(fixed + one + largest)} of memory, --memory allows {_gib(memory)}"
            + (f" ({worst.spec.name} must be held whole: {_gib(largest)})" if largest else ""),
            "plan",
            f"raise it: --memory {-(-(fixed + one + largest) // 2**30)}GiB",
        )
    step_budget = max(largest, budget - fixed - count * one)
    together = min(step_budget, sum(whole[:count]))
    before = max(_fit_memory(plan, cores, memory), _measuring_memory(plan, memory))
    peak = fixed + max(count * one + together, before)
    return Costs(count, peak, step_budget, plan.bytes_in, plan.bytes_out, room=room_to_measure(memory))


def _fit_memory(plan: Plan, threads: int, memory: int | None) -> int:
    """What looking at the whole models takes, before they are merged. Raises PlanError when `memory` is less.

    `threads`: all cores, however few workers there are: none of them computes meanwhile.
    """
    method = plan.recipe.method
    needed = method.fit_memory(plan.headers, threads)
    _check_before(needed, memory, f"{method.method_name()} needs {{}} to look at whole models")
    return needed


def _measuring_memory(plan: Plan, memory: int | None) -> int:
    """What measuring one statistic takes at most, or one of all models together. Raises PlanError for less `memory`."""
    every, room = to_measure(plan.sources), room_to_measure(memory)
    alone, together = ([each for each in every if each.is_joint == joint] for joint in (False, True))
    for asked in alone:
        _check_before(asked.memory_in(room), memory, f"{asked.where} needs {{}} to measure its {asked.statistic.name}")
    at_once = sum(asked.memory for asked in together)
    if together:
        _check_before(at_once, memory, f"all models together need {{}} to measure {together[0].statistic.name}")
    return max((at_once, *(asked.memory_in(room) for asked in alone)))


def room_to_measure(memory: int | None) -> int:
    """Bytes that a network, and what is measured on it, may take."""
    return (int(0.8 * available_memory()) if memory is None else memory) - RUNTIME_BYTES - _SPARE


def _check_before(needed: int, memory: int | None, what: str) -> None:
    """Raise PlanError where something that is done before merging needs more memory than there may be."""
    total = needed + RUNTIME_BYTES + _SPARE
    if memory is not None and total > memory:
        fix = f"raise it: --memory {-(-total // 2**30)}GiB"
        raise PlanError(f"{what.format(_gib(total))}, --memory allows {_gib(memory)}", "plan", fix)


def check_disk(plan: Plan, output: Path, is_made: Callable[[Plan], bool] = lambda _: False) -> None:
    """Raise OutputError when the output, and results of recipes inside that are read for it, cannot fit on the disk.

    How much of a sparse file there will be, nobody knows yet: where the disk is full, the run ends, and can go on.
    """
    place = output.parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    needed = bytes_on_disk(plan, is_made) - sum(each.header.file_size for each in plan.shards if each.sparse)
    if free < needed:
        more = " (with what the recipes inside it make)" if plan.inner else ""
        raise OutputError(
            f"needs {filesize(needed)}{more}, {filesize(free)} are free on that disk",
            str(output),
            "free some space, or choose another place with -o PATH",
        )


def available_memory() -> int:
    """Bytes of memory that could be used now without swapping, on this machine and in this container."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    with suppress(OSError, ValueError):  # "max" where there is no limit
        available = min(available, int(_CONTAINER_LIMIT.read_text()))
    return available


def _gib(size: int) -> str:
    return memsize(size)
