"""A plan as data and as a table: what `mergetool plan` prints."""

from collections.abc import Sequence
from typing import Any

from mergetool.planning.cost import Costs
from mergetool.planning.duration import MACHINES, Machine, expected_seconds, is_guess
from mergetool.planning.graph import Plan, Slot, Step


def describe(plan: Plan, costs: Costs) -> dict[str, Any]:
    """The whole plan as JSON-able data."""
    return {
        "output": str(plan.output) if plan.output else None,
        "method": plan.recipe.method.method_name(),
        "steps": [_step(plan, step, slot) for step in plan.steps for slot in step.slots],
        "files": [{"name": file.name, "bytes": file.size, "at_most": file.at_most} for file in plan.files],
        "shards": [{"name": shard.name, "bytes": shard.header.file_size} for shard in plan.shards],
        "bytes_to_download": plan.bytes_missing,
        "origins": {name: [vars(origin) for origin in origins] for name, origins in plan.origins.items()},
        "bytes_in": costs.bytes_in,
        "bytes_out": costs.bytes_out,
        "peak_memory": costs.peak_memory,
        "workers": costs.workers,
        "expected_seconds": {machine.name: round(expected_seconds(plan, machine), 1) for machine in MACHINES},
        "warnings": list(plan.warnings),
    }


def _step(plan: Plan, step: Step, slot: Slot) -> dict[str, Any]:
    return {
        "name": slot.spec.name,
        "dtype": slot.spec.dtype.name,
        "shape": list(step.spec.shape),
        "shard": plan.shards[slot.shard].name,
        "method": step.operation.name,
        "from": list(step.reads),
        "depth": round(step.depth, 6),
        "parameters": dict(step.operation.numbers),
    }


def summarise(plan: Plan, costs: Costs) -> tuple[tuple[str, ...], list[Sequence[Any]], list[Sequence[Any]]]:
    """(column heads, one row per tensor, facts about the whole)."""
    heads = ("tensor", "shape", "dtype", "how", "from", "parameters")
    rows: list[Sequence[Any]] = [
        (
            step.name,
            "x".join(map(str, step.spec.shape)) or "scalar",
            step.spec.dtype.name,
            step.operation.name,
            ", ".join(step.reads),
            ", ".join(f"{key}={_short(value)}" for key, value in step.operation.numbers.items()),
        )
        for step in plan.steps
    ]
    facts: list[Sequence[Any]] = [
        ("tensors", len(plan.specs)),
        ("bytes to download first", plan.bytes_missing),
        ("bytes read", costs.bytes_in),
        ("bytes written", costs.bytes_out),
        ("output files", len(plan.files)),
        ("workers", costs.workers),
        ("peak memory, at most", costs.peak_memory),
        *((f"expected time, {machine.name}", _duration(plan, machine)) for machine in MACHINES),
        ("output", str(plan.output) if plan.output else "give -o PATH"),
    ]
    return heads, rows, facts


def _duration(plan: Plan, machine: Machine) -> str:
    seconds = expected_seconds(plan, machine)
    told = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    return f"{told}, and the fit" if is_guess(plan) else told


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return _short(value[0]) if len(set(value)) == 1 else f"({', '.join(map(_short, value))})"
    return f"{value:.4g}"
