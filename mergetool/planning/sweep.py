"""The plan of a sweep: one run whose steps fill the slots of several results.

Operands are read for all of them; what is counted is counted once for each set of numbers that it depends on. Where
results differ in nothing but a last factor, what comes before it is made once. Every result has the bytes that a run of
its own would have.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetool.errors import PlanError
from mergetool.methods.base import Granularity, Params, StatisticsPass, Stats, TensorGroup, TensorMethod
from mergetool.methods.group import Note
from mergetool.planning.graph import Plan, Shard, Slot, Step
from mergetool.planning.operations import Merge, Operation
from mergetool.recipe.schema import Recipe
from mergetool.tensors.header import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

_COARSENESS: tuple[Granularity, ...] = ("element", "row", "tensor")


@dataclass(frozen=True)
class Sweep(Operation):
    """One merge for each result, in their order; their slots lie one behind the other in the step."""

    points: tuple[Merge, ...]
    results: tuple[str, ...]
    keeps = False

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.points[0].name

    @property
    def method(self) -> TensorMethod:  # type: ignore[override]
        return self.points[0].method

    @property
    def models(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.points[0].models

    @property
    def arithmetic(self) -> bool:  # type: ignore[override]
        return self.points[0].arithmetic

    @property
    def buffers(self) -> int:  # type: ignore[override]
        return max(point.buffers for point in self.points) + 1

    @property
    def needs_float64(self) -> bool:  # type: ignore[override]
        return any(point.needs_float64 for point in self.points)

    @property
    def counts_model(self) -> bool:  # type: ignore[override]
        return any(point.counts_model for point in self.points)

    @property
    def folds(self) -> bool:  # type: ignore[override]
        return all(point.folds for point in self.points)

    @property
    def numbers(self) -> Mapping[str, Any]:
        return self.points[0].numbers

    @property
    def told(self) -> Mapping[str, Any]:
        every = {key: [point.numbers[key] for point in self.points] for key in self.numbers}
        return {key: values[0] if _all_same(values) else _row(values) for key, values in every.items()}

    def granularity(self, spec: TensorSpec) -> Granularity:
        return max((point.granularity(spec) for point in self.points), key=_COARSENESS.index)

    def treatment(self, spec: TensorSpec) -> str:
        return self.points[0].treatment(spec)

    def partners(self, name: str) -> tuple[str, ...]:
        return self.points[0].partners(name)

    @cached_property
    def alike(self) -> tuple[tuple[int, ...], ...]:
        """Results that differ in nothing but a last factor, if anything: by their places."""
        groups: list[list[int]] = []
        for place, point in enumerate(self.points):
            group = next((each for each in groups if _alike(self.points[each[0]], point)), None)
            if group is None:
                groups.append([place])
            else:
                group.append(place)
        return tuple(map(tuple, groups))

    @cached_property
    def _passes(self) -> tuple[tuple[int, ...], tuple[Merge, ...]]:
        """Of which of several passes each result is in need, and a result for each pass."""
        places: list[int] = []
        first: list[Merge] = []
        for point in self.points:
            settings = point.pass_settings
            place = next((index for index, each in enumerate(first) if each.pass_settings == settings), len(first))
            places.append(place)
            first += [point] if place == len(first) else []
        return tuple(places), tuple(first)

    @cached_property
    def counts(self) -> StatisticsPass | None:  # type: ignore[override]
        _, first = self._passes
        if len(first) == 1:
            return first[0].counts
        following = _following(tuple((each.counts, each.params) for each in first), {}, 0)
        return None if isinstance(following, Mapping) else following

    def stats_of(self, place: int, stats: Stats) -> Stats:
        """What was counted for one of the results."""
        places, first = self._passes
        begin = f"{places[place]} "
        if len(first) == 1:
            return stats
        return {key.removeprefix(begin): each for key, each in stats.items() if key.startswith(begin)}

    def step_of(self, step: Step, places: Iterable[int]) -> Step:
        """A step that merges for these results, with the numbers of the first."""
        size, places = len(step.slots) // len(self.points), tuple(places)
        slots = tuple(slot for place in places for slot in step.slots[place * size : (place + 1) * size])
        return replace(step, slots=slots, operation=self.points[places[0]])

    def noted(self, place: int, notes: Iterable[Note]) -> list[Note]:
        """Notes as those of one result."""
        return [note_of(self.results[place], note) for note in notes]

    def perform(self, bench: Any, step: Any, start: int, stop: int, notes: list[Note], stats: Stats) -> None:
        bench.sweep(step, start, stop, notes, self, stats)


def note_of(result: str, note: Note) -> Note:
    """A note that says which result it is about."""
    return f"{result}: {note}" if isinstance(note, str) else (f"{result}: {note[0]}", note[1])


def told(step: Step, notes: list[Note]) -> list[Note]:
    """What is noted of a step, where it is for one result."""
    return [note_of(step.result, note) for note in notes] if step.result else notes


def notes_about(result: str, others: Iterable[str], notes: Iterable[Note]) -> list[Note]:
    """Of notes on all results, those about one of them, and about all."""
    others = [f"{other}: " for other in others if other != result]
    texts = [(note if isinstance(note, str) else note[0], note) for note in notes]
    own = [(text.removeprefix(f"{result}: "), note) for text, note in texts if not text.startswith(tuple(others))]
    return [text if isinstance(note, str) else (text, note[1]) for text, note in own]


def _alike(one: Merge, other: Merge) -> bool:
    scales = [point.numbers.get("scale") for point in (one, other)]
    plain = all(isinstance(scale, float | int) for scale in scales)
    if not plain or not scales_last(one.method) or type(one.method) is not type(other.method):
        return one == other
    numbers = [{key: each for key, each in point.numbers.items() if key != "scale"} for point in (one, other)]
    methods = [point.method.model_copy(update={"scale": 1.0}) for point in (one, other)]
    return numbers[0] == numbers[1] and methods[0] == methods[1]


def scales_last(method: TensorMethod) -> bool:
    """Whether `scale` is nothing but a factor on what a method adds to the base in the end."""
    owners = [next(each for each in type(method).__mro__ if name in vars(each)) for name in ("change", "merge")]
    return owners[0] is owners[1] and owners[0] is not TensorMethod


@dataclass(frozen=True)
class _Passes(StatisticsPass):
    """The passes of several sets of numbers, one after the other."""

    every: tuple[tuple[StatisticsPass | None, Params], ...]
    known: Stats
    place: int
    now: StatisticsPass

    @property
    def one_in(self) -> int:  # type: ignore[override]
        return self.now.one_in

    @property
    def joined(self) -> bool:  # type: ignore[override]
        return self.now.joined

    def observe(self, groups: Iterable[TensorGroup], p: Params) -> "Tensor":
        return self.now.observe(groups, self.every[self.place][1])

    def conclude(self, total: "Tensor") -> StatisticsPass | Stats:
        found = self.now.conclude(total)
        if not isinstance(found, Mapping):
            return replace(self, now=found)
        known = {**self.known, **{f"{self.place} {key}": each for key, each in found.items()}}
        return _following(self.every, known, self.place + 1)


def _following(
    every: tuple[tuple[StatisticsPass | None, Params], ...], known: Stats, place: int
) -> StatisticsPass | Stats:
    for index, (first, _) in enumerate(every[place:], place):
        if first is not None:
            return _Passes(every, known, index, first)
    return known


def _all_same(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values)


def _row(values: Sequence[Any]) -> Any:
    """The values of all results as a table shows them."""
    return tuple(values) if not isinstance(values[0], tuple) else f"{len(values)} different"


def swept(recipe: Recipe, output: Path | None, plan_of: Callable[[Plan | None, Recipe], Plan]) -> Plan:
    """The plan of all results of a sweep. `plan_of` makes that of one, from the first's where there is one."""
    plans: dict[str, Plan] = {}
    first: Plan | None = None
    for name, each in recipe.points.items():
        plans[name] = plan_of(first, each)
        first = first or plans[name]
    assert first is not None
    output = output or first.output
    points = {name: replace(plan, output=output and output / name) for name, plan in plans.items()}
    if first.forms:
        return _side_by_side(replace(first, recipe=recipe, output=output, points=points))
    shards = tuple(replace(shard, name=f"{name}/{shard.name}") for name in plans for shard in first.shards)
    steps = list(zip(*(plan.steps for plan in plans.values()), strict=True))
    if any(step.operation.counts_again for each in steps for step in each):
        what = "a step counts over each tensor once something is counted over the whole model"
        raise PlanError(what, "sweep", f"write {_by_tensor(first)}; or make one result a run: --set merge.NUMBER=...")
    whole = any(not _all_same([s.operation for s in each]) and _counts_model(each) for each in steps)
    return replace(
        first,
        recipe=recipe,
        steps=tuple(_step(each, tuple(plans), len(first.shards), whole=whole) for each in steps),
        shards=shards,
        output=output,
        points=points,
    )


def _side_by_side(plan: Plan) -> Plan:
    """Of adapters: every result has steps of its own, which are small."""
    steps: list[Step] = []
    shards: list[Shard] = []
    for name, point in plan.points.items():
        steps += [_moved(step, name, len(steps), len(shards)) for step in point.steps]
        shards += [replace(shard, name=f"{name}/{shard.name}") for shard in point.shards]
    if any(step.operation.counts_model for step in steps):
        what = "a step counts over the whole model, which is done once a run where the result is an adapter"
        raise PlanError(what, "sweep", f"write {_by_tensor(plan)}; or make one result a run: --set merge.NUMBER=...")
    most = sum(point.bytes_out for point in plan.points.values())
    return replace(plan, steps=tuple(steps), shards=tuple(shards), bytes_at_most=most)


def _moved(step: Step, result: str, steps: int, shards: int) -> Step:
    """A step of one result behind those of others."""
    slots = tuple(replace(slot, shard=slot.shard + shards) for slot in step.slots)
    partners = {name: index + steps for name, index in step.partners.items()}
    return replace(step, index=step.index + steps, slots=slots, partners=partners, result=result)


def _by_tensor(plan: Plan) -> str:
    return next(step.operation.method.by_tensor for step in plan.steps if step.operation.method is not None)


def _counts_model(steps: Sequence[Step]) -> bool:
    """Whether a pass counts over the whole model. Raises PlanError where it does so for some results only."""
    kinds = {step.operation.counts_model for step in steps}
    if len(kinds) > 1:
        what = "some results need a count over the whole model, and others do not"
        raise PlanError(what, "sweep", "sweep over those values in runs of their own")
    return kinds.pop()


def _step(steps: Sequence[Step], names: tuple[str, ...], files: int, *, whole: bool) -> Step:
    """One step for those of all results. `whole`: where passes over the model are for several sets of numbers."""
    first = steps[0]
    slots = tuple(
        Slot(slot.spec, slot.shard + place * files) for place, step in enumerate(steps) for slot in step.slots
    )
    merges = [step.operation for step in steps if isinstance(step.operation, Merge)]
    if not merges or (_all_same(merges) and not (whole and first.operation.counts_model)):
        return replace(first, slots=slots)
    return replace(first, slots=slots, operation=Sweep(tuple(merges), names))
