"""How long a run should take on a given machine: the longest of what the disk, the cores and the devices have to do.

    disk      every input byte read once (again for a statistics pass, where it does not fit in memory), every output
              byte written
    cores     arithmetic of slices, SHA-256 of inputs and outputs; SVDs of whole matrices by their cubic count
    devices   slices read into pinned memory by the cores, copied over the bus as they are stored, and worked on, all at
              the same time; calls of operations, and the SVDs

The rates of "this machine" were fitted to runs here; those of others are what their makers say, taken by half. An
estimate is meant to be right within a factor of two. Where `auto` has a choice, rates are measured (`engine.rates`).
"""

import math
from dataclasses import dataclass, replace

from mergetool.planning.cost import available_memory
from mergetool.planning.graph import UNIT_ELEMENTS, Plan, Step
from mergetool.planning.inner import needed
from mergetool.planning.measures import to_measure
from mergetool.statistics.measure import Measuring

_SVD_PASSES = 12.0
"""Multiply-adds of a decomposition, in units of rows x columns x the shorter side."""
_BY_PRODUCTS, _MANY = 1 / 6, 6
"""Of that, what leading directions alone cost on a device, where products find them: of so many models or more."""
_TOKENS = 200
"""Of one item of a task, with all its choices."""
_CALLS, _CALL = 8, 1e-5
"""Operations on each operand of a slice, and the seconds that each holds the interpreter's lock."""
_TRAFFIC = 8
"""Bytes that an element operation reads and writes."""
_STARTUP = 1.0
"""Seconds for starting Python and torch, and for the last files."""


@dataclass(frozen=True)
class Machine:
    """Rates, in bytes, element operations or floating-point operations a second."""

    name: str
    nodes: int = 1
    cores: int = 2
    """Of all nodes together, as far as workers use them."""
    devices: int = 0
    disk_read: float = 2.0e9
    disk_write: float = 1.0e9
    """Of all nodes together: a shared file system is one disk."""
    element_rate: float = 0.6e9
    """Element operations (one element of one stream) of a core."""
    hash_rate: float = 1.6e9
    core_flops: float = 2.5e10
    copy_rate: float = 4.0e9
    """Bytes a second that a core reads from the page cache."""
    bus: float = 2.5e10
    """Bytes a second to one device."""
    device_memory: float = 1.5e12
    """Bytes a second that one device reads and writes in its own memory."""
    device_start: float = 0.0
    """Seconds until a device and its libraries are ready, beside Python's."""
    device_flops: float = 5.0e12
    """Of one device in float32, for decompositions."""
    memory: float = 8e9
    """For the page cache: what fits is not read twice."""


THIS = Machine("this kind of machine: two cores, one disk")
MACHINES = (
    THIS,
    Machine("one disk, 16 cores", cores=16, disk_read=3e9, disk_write=1.5e9, memory=64e9),
    Machine("one H200", cores=16, devices=1, disk_read=5e9, disk_write=3e9, memory=128e9),
    Machine("eight GPUs", cores=96, devices=8, disk_read=1e10, disk_write=5e9, memory=1e12),
    Machine("four nodes of eight GPUs", 4, cores=384, devices=32, disk_read=2e10, disk_write=1e10, memory=4e12),
)


def this_machine(workers: int) -> Machine:
    """The machine that this runs on, as far as so many workers use it."""
    return replace(THIS, name="here", cores=workers, memory=available_memory())


def expected_seconds(plan: Plan, machine: Machine = THIS) -> float:
    """Seconds that a run of this plan should take on `machine`, with the recipes inside it."""
    return _STARTUP + sum(working_seconds(each, machine) for each in (plan, *dict(needed(plan)).values()))


def working_seconds(plan: Plan, machine: Machine) -> float:
    """Seconds of a plan by itself, once Python is there."""
    inputs = sum(stamp.size for source in plan.sources.values() for stamp in source.files) or plan.bytes_in
    again = _counted_bytes(plan)
    disk = (
        inputs + (again if inputs > machine.memory else 0)
    ) / machine.disk_read + plan.bytes_out / machine.disk_write
    hashing = (inputs + plan.bytes_out) / machine.hash_rate / machine.cores
    elements = sum(_element_operations(step) for step in plan.steps)
    flops = sum(_flops(step) for step in plan.steps)
    if machine.devices:
        moved = plan.bytes_in + again + plan.bytes_out
        flops *= _BY_PRODUCTS if plan.recipe.method.uses_factors and len(plan.recipe.models) >= _MANY else 1.0
        there = max(moved / machine.bus, elements * _TRAFFIC / machine.device_memory) + flops / machine.device_flops
        cores = hashing + moved / machine.copy_rate / machine.cores
        work = max(disk, cores, there / machine.devices) + _calls(plan) * _CALL + machine.device_start
    else:
        work = max(disk, (elements / machine.element_rate + flops / machine.core_flops) / machine.cores + hashing)
    return work + sum(measuring_seconds(asked, machine) for asked in to_measure(plan.sources))


def _calls(plan: Plan) -> int:
    """Of operations on a device."""
    slices = (math.ceil(step.spec.num_elements / UNIT_ELEMENTS) for step in plan.steps if step.operation.arithmetic)
    return sum(slices) * max((_CALLS * len(step.reads) for step in plan.steps), default=0)


def measuring_seconds(asked: Measuring, machine: Machine) -> float:
    """Seconds that measuring one statistic should take, on one device or on the cores of one machine."""
    if machine.devices:
        return asked.flops / machine.device_flops
    return asked.flops / machine.core_flops / (machine.cores / machine.nodes)


def _element_operations(step: Step) -> float:
    """Every stream of a slice is read, widened and used; every temporary is written and read."""
    if step.operation.bytes_held is not None:
        return 0.0
    whole = step.operation.granularity(step.spec) == "tensor"
    temporaries = 0 if whole else step.operation.buffers
    return step.spec.num_elements * (len(step.reads) + 1 + temporaries)


def _flops(step: Step) -> float:
    if step.operation.flops is not None:
        return step.operation.flops
    if step.operation.granularity(step.spec) != "tensor" or len(step.spec.shape) < 2:
        return 0.0
    rows = step.spec.shape[0]
    shorter = min(rows, step.spec.num_elements // max(1, rows))
    return _SVD_PASSES * len(step.reads) * step.spec.num_elements * shorter


def _counted_bytes(plan: Plan) -> int:
    """Bytes that statistics passes read before merging reads them again."""
    counted = (step for step in plan.steps if step.operation.counts is not None)
    return sum(plan.bytes_read(step, step.spec.num_elements) for step in counted)


def answer_seconds(plan: Plan, machine: Machine) -> float:
    """Seconds in which the merged model should answer one item of a task, on the cores alone."""
    parameters = sum(step.spec.num_elements for step in plan.steps)
    return 2.0 * parameters * _TOKENS / machine.core_flops / machine.cores


def is_guess(plan: Plan) -> bool:
    """Whether a fit, whose iterations nobody knows beforehand, comes on top."""
    return "fit" in plan.recipe.method.stages()
