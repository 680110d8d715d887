"""What `auto` takes: a device, where the plan and the rates of this machine say that it is clearly faster."""

import os
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from mergetool.engine import devices
from mergetool.errors import PlanError
from mergetool.planning import Plan
from mergetool.planning.cost import Costs, available_memory, estimate
from mergetool.planning.duration import Machine, expected_seconds
from mergetool.units import timespan

_CLEARLY = 0.85
"""Of the time on the CPU."""
_SIGNS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/nvhost-gpu")
"""Where Linux has devices that torch may know."""


def settled(plan: Plan, device: str, *, workers: int | None, memory: int | None, processes: int = 1) -> Costs:
    """Workers, memory, and device of one process of a run. Raises PlanError where `memory` is too little.

    A device that is asked for by name is taken as it is; whether it can be used is seen when the run begins.
    """
    costs = estimate(plan, workers=workers, memory=memory, processes=processes)
    if device == "cpu":
        return costs
    if device != "auto":
        return _on_device(plan, device, workers, memory, processes)
    for found in _found():
        if found == "mps" and plan.needs_float64:  # which it has not
            continue
        with suppress(PlanError, RuntimeError, AssertionError):  # it cannot be used, or needs more memory
            there = _on_device(plan, found, workers, memory, processes)
            chosen = _faster(plan, costs, there, processes)
            if chosen.device != "cpu":
                devices.usable_device(found, double=plan.needs_float64)
            return chosen
    return costs


def _found() -> list[str]:
    """The devices here; torch, whose import takes a while, is asked only where there may be any."""
    if "torch" in sys.modules or sys.platform == "darwin" or any(Path(sign).exists() for sign in _SIGNS):
        return devices.devices_here()
    return []


def _on_device(plan: Plan, device: str, workers: int | None, memory: int | None, processes: int) -> Costs:
    from mergetool.engine.transfers import PINNED_BYTES

    costs = estimate(plan, workers=workers, memory=memory, processes=processes, pinned=PINNED_BYTES)
    return replace(costs, device=device)


def _faster(plan: Plan, here: Costs, there: Costs, processes: int) -> Costs:
    """The costs on the CPU, or those on a device."""
    import torch

    from mergetool.engine.rates import rates_of

    cores = min(len(os.sched_getaffinity(0)), here.workers * processes)
    rates = rates_of(torch.device(there.device), cores)
    machine = Machine("here", cores=cores, memory=available_memory(), **asdict(rates))
    on_cpu, on_device = (expected_seconds(plan, replace(machine, devices=count)) for count in (0, processes))
    why = f"cpu: {timespan(on_cpu)} expected, {there.device}: {timespan(on_device)}"
    if on_device < _CLEARLY * on_cpu:
        return replace(there, why=why, seconds=on_device)
    return replace(here, why=why, seconds=on_cpu)
