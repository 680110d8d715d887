"""Who of several processes does what of a plan: units of work by what they cost, files to hash by their size."""

from dataclasses import dataclass, field
from typing import Any

from mergetool.engine.processes import Team
from mergetool.planning import Plan, Step


@dataclass(frozen=True)
class Partition:
    """What one process does of a plan."""

    team: Team = field(default_factory=Team)
    units: frozenset[tuple[int, int]] | None = None
    """(step, start) of every unit; None: all of them."""
    inputs: frozenset[str] | None = None
    outputs: frozenset[int] | None = None
    """Files that it hashes: inputs by path, outputs by number."""

    def has(self, step: int, start: int) -> bool:
        return self.units is None or (step, start) in self.units

    def hashes_input(self, path: str) -> bool:
        return self.inputs is None or path in self.inputs

    def hashes_output(self, shard: int) -> bool:
        return self.outputs is None or shard in self.outputs


def partition(plan: Plan, team: Team) -> Partition:
    """This process's share. Large pieces first, each to whoever has least; the same in every process.

    A tensor with a pass of its own is not divided: its counts would have to travel.
    """
    if team.size == 1:
        return Partition(team)
    load = [0.0] * team.size
    inputs = {str(stamp.path): float(stamp.size) for stamps in plan.stamps.values() for stamp in stamps}
    outputs = {index: float(shard.header.file_size) for index, shard in enumerate(plan.shards)}
    given_inputs, given_outputs = _dealt(inputs, load), _dealt(outputs, load)
    pieces: dict[tuple[int, int], float] = {}
    whole: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for step in plan.steps:
        ranges = step.pieces()
        groups = [ranges] if _counted_alone(step) else [[each] for each in ranges]
        for group in groups:
            key = (step.index, group[0][0])
            pieces[key] = sum(cost(plan, step, start, stop) for start, stop in group)
            whole[key] = [(step.index, start) for start, _ in group]
    keys = _dealt(pieces, load)[team.rank]
    units = frozenset(unit for key in keys for unit in whole[key])
    return Partition(team, units, frozenset(given_inputs[team.rank]), frozenset(given_outputs[team.rank]))


def _counted_alone(step: Step) -> bool:
    operation = step.operation
    return operation.counts_again or (operation.counts is not None and not operation.counts_model)


def _dealt(costs: dict[Any, float], load: list[float]) -> list[list[Any]]:
    """Keys for each process; adds to `load`. What is much larger than the rest first, the rest in its order."""
    dealt: list[list[Any]] = [[] for _ in load]
    large = sum(costs.values()) / (8 * len(load))
    order = sorted(costs, key=lambda key: -costs[key] if costs[key] > large else 0.0)  # stable
    for key in order:
        least = min(range(len(load)), key=load.__getitem__)
        dealt[least].append(key)
        load[least] += costs[key]
    return dealt


def cost(plan: Plan, step: Step, start: int, stop: int) -> float:
    """What a unit costs, in bytes that could be read meanwhile: reading, writing, and for whole matrices the SVDs."""
    count = stop - start
    size = plan.bytes_read(step, count) + step.bytes_written(start, stop)
    if step.operation.granularity(step.spec) != "tensor" or len(step.spec.shape) < 2:
        return float(size)
    rows = step.spec.shape[0]
    return size + 0.5 * len(step.reads) * count * min(rows, count // max(1, rows))
