"""A plan as data and as tables: what `mergetool plan` prints."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mergetool.methods.base import Method, expect
from mergetool.methods.families.judged import JudgedSearch
from mergetool.planning.cost import Costs
from mergetool.planning.duration import (
    MACHINES,
    Machine,
    answer_seconds,
    expected_seconds,
    is_guess,
    measuring_seconds,
    this_machine,
)
from mergetool.planning.graph import Plan, Slot, Step
from mergetool.planning.inner import bytes_on_disk, needed
from mergetool.planning.measures import to_measure
from mergetool.planning.parents import label
from mergetool.planning.patterns import patterns, treatment
from mergetool.planning.search import SearchSize
from mergetool.statistics.measure import Measuring
from mergetool.units import filesize, memsize, timespan

Rows = list[Sequence[Any]]
HEADS = ("tensor", "count", "shape", "dtype", "how", "from", "parameters")


def describe(plan: Plan, costs: Costs, search: Method | None = None) -> dict[str, Any]:
    """The whole plan as JSON-able data. `search`: what the recipe asks for where the plan is of a candidate."""
    return {
        "output": str(plan.output) if plan.output else None,
        "method": plan.recipe.method.method_name(),
        "then": [step.model_dump(exclude_defaults=True) | {"step": step.step_name()} for step in plan.recipe.then],
        "results": {name: str(each.output) for name, each in plan.points.items()},
        "steps": [_step(plan, step, slot) for step in plan.steps for slot in _slots(plan, step)],
        "files": [{"name": file.name, "bytes": file.size, "at_most": file.at_most} for file in plan.files],
        "shards": [{"name": shard.name, "bytes": shard.header.file_size} for shard in plan.shards],
        "bytes_to_download": plan.bytes_missing,
        "origins": {name: [vars(origin) for origin in origins] for name, origins in plan.origins.items()},
        "bytes_in": costs.bytes_in,
        "bytes_out": costs.bytes_out,
        "peak_memory": costs.peak_memory,
        "workers": costs.workers,
        "expected_seconds": {machine.name: round(expected_seconds(plan, machine), 1) for machine in MACHINES},
        "expected_seconds_here": round(_seconds_here(plan, costs), 1),
        "device": costs.device,
        "device_chosen": costs.why,
        "vocabulary": plan.words.rows,
        "bytes_beside": bytes_on_disk(plan) - plan.bytes_out,
        "statistics": {asked.where: _measured(asked, costs) for asked in to_measure(plan.sources)},
        "inner": {name: _inner(each) for name, each in needed(plan)},
        "warnings": list(plan.warnings),
        "search": None if search is None else vars(_size(plan, search)),
    }


def _measured(asked: Measuring, costs: Costs) -> dict[str, Any]:
    """What is measured on a model, and what that costs if it is not kept from before."""
    seconds = round(measuring_seconds(asked, this_machine(costs.workers)), 1)
    told = {"memory": asked.memory_in(costs.room), "by_layer": asked.is_layered(costs.room)}
    return {**asked.describe(), **told, "expected_seconds_here": seconds}


def _inner(plan: Plan) -> dict[str, Any]:
    """A recipe inside the one that is planned."""
    return {
        "method": plan.recipe.method.method_name(),
        "models": list(plan.recipe.models),
        "steps": [_step(plan, step, slot) for step in plan.steps for slot in step.slots],
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
    }


def tables(plan: Plan, *, full: bool = False) -> list[tuple[str, Rows]]:
    """What becomes of the tensors, under a title each: of what recipes inside make, then of the result."""
    inner = [
        (f"first {name}: {each.recipe.method.method_name()}", rows(each, full=full)) for name, each in needed(plan)
    ]
    return [*inner, (f"then: {plan.recipe.method.method_name()}" if inner else "", rows(plan, full=full))]


def _slots(plan: Plan, step: Step) -> Sequence[Slot]:
    """The slots of a step; of a sweep, in its first result."""
    return step.slots[: len(step.slots) // max(1, len(plan.points))]


def _step(plan: Plan, step: Step, slot: Slot) -> dict[str, Any]:
    return {
        "name": slot.spec.name,
        "dtype": slot.spec.dtype.name,
        "shape": list(step.spec.shape),
        "shard": plan.shards[slot.shard].name,
        "method": step.operation.name,
        "how": treatment(step),
        "from": list(step.reads),
        "depth": round(step.depth, 6),
        "parameters": dict(step.operation.told),
    }


def rows(plan: Plan, *, full: bool = False) -> Rows:
    """What becomes of the tensors, under `HEADS`: a row for each pattern of layers, or (`full`) for each tensor."""
    return [
        (
            pattern.name,
            f"x{len(pattern.steps)}" if len(pattern.steps) > 1 else "",
            "x".join(map(str, pattern.steps[0].spec.shape)) or "scalar",
            pattern.steps[0].spec.dtype.name,
            pattern.how,
            ", ".join(pattern.steps[0].reads),
            ", ".join(f"{key}={value}" for key, value in pattern.parameters().items()),
        )
        for pattern in patterns(plan, full=full)
    ]


def totals(plan: Plan, costs: Costs, *, machines: bool = False, search: Method | None = None) -> Rows:
    """Facts about the whole: amounts, memory, time here (with `machines`, elsewhere too)."""
    counts = Counter(treatment(step) for step in plan.steps for _ in ([step] if step.work else step.slots))
    told = ", ".join(f"{count:,} {how}" for how, count in counts.most_common())
    files = f"{len(plan.files)} files" if len(plan.files) > 1 else plan.files[0].name
    at_most = "" if plan.bytes_at_most is None else "at most "
    result = "" if search is None else ", for the result"
    here = this_machine(costs.workers)
    here_told = _told(plan, _seconds_here(plan, costs))
    elsewhere = [(machine.name, _told(plan, expected_seconds(plan, machine))) for machine in MACHINES if machines]
    return [
        ("tensors", f"{plan.num_tensors:,} ({told})"),
        *([("sweep", f"{len(plan.points)} results: {', '.join(plan.points)}")] if plan.points else []),
        *([("to download first", filesize(plan.bytes_missing))] if plan.bytes_missing else []),
        *_vocabulary(plan),
        ("to read", filesize(costs.bytes_in)),
        ("to write", f"{at_most}{filesize(costs.bytes_out)} in {files}"),
        *_beside(plan),
        *(
            ("counted first", f"over {len(stage.steps):,} tensors together")
            for stage in plan.stages
            if stage.name == "count"
        ),
        *_statistics(plan, costs),
        ("memory, at most", f"{memsize(costs.peak_memory)} with {costs.workers} workers"),
        *([("device", f"{costs.device} ({costs.why})")] if costs.why else []),
        *((f"expected time, {name}", f"{told}{result}") for name, told in (("here", here_told), *elsewhere)),
        *(_search(plan, search, here) if search is not None else ()),
        ("output", str(plan.output) if plan.output else "give -o PATH"),
    ]


def _vocabulary(plan: Plan) -> Rows:
    """Where the rows of tokens come from, in each model's view: of one tensor for all that are alike."""
    alike: dict[str, list[str]] = {}
    for name, models in plan.words.rows.items():
        for model, counts in models.items():
            whose = {model: "its own"} | {other: f"of {label(other)}" for other in plan.sources if other != model}
            told = ", ".join(f"{count:,} {whose.get(each, each)}" for each, count in counts.items())
            alike.setdefault(f"{label(model)}: {told}", []).append(name)
    return [(f"rows of {names[0]}", told) for told, names in alike.items()]


def _statistics(plan: Plan, costs: Costs) -> Rows:
    """What is measured first, unless it is kept from before."""
    return [
        (
            f"{asked.statistic.name} of {asked.where}",
            f"on {len(asked.examples):,} rows ({asked.tokens:,} tokens), at most {filesize(asked.num_bytes)}, "
            f"{timespan(measuring_seconds(asked, this_machine(costs.workers)))}"
            + (", layer by layer" if asked.is_layered(costs.room) else ""),
        )
        for asked in to_measure(plan.sources)
    ]


def _beside(plan: Plan) -> Rows:
    """What recipes inside write, which goes again."""
    names = [name for name, _ in needed(plan)]
    more = filesize(bytes_on_disk(plan) - plan.bytes_out)
    return [("for a time", f"{more} more on the disk, for {', '.join(names)}")] if names else []


def _size(plan: Plan, search: Method) -> SearchSize:
    return SearchSize.of(expect(search, JudgedSearch).settled(plan.sources), tuple(plan.sources))


def _search(plan: Plan, search: Method, here: Machine) -> Rows:
    """How much is asked of how many candidates. How many items the tasks have is known only when they are loaded."""
    size = _size(plan, search)
    each = "all search items" if size.each is None else f"{size.each:,} items"
    rows: Rows = [("candidates", f"{size.candidates:,}, each merged in memory and asked {each}")]
    everything = [f"{size.calibration} before (models and random merges)"] if size.calibration else []
    everything += [f"the {size.finalists} best after"] if size.each is not None else []
    if everything:
        rows.append(("asked all search items", ", ".join(everything)))
    rows.append(("asked the report items", f"{size.reported} (winner, start of the search, models)"))
    seconds = answer_seconds(plan, here)
    told = f"roughly {timespan(seconds)} an item"
    if size.each is not None:
        told += f", {timespan(seconds * size.each * size.candidates)} for all candidates, and what is asked everything"
    return [*rows, ("expected time of answers", told)]


def _seconds_here(plan: Plan, costs: Costs) -> float:
    return expected_seconds(plan, this_machine(costs.workers)) if costs.seconds is None else costs.seconds


def _told(plan: Plan, seconds: float) -> str:
    return f"{timespan(seconds)}, and the fit" if is_guess(plan) else timespan(seconds)
