"""The recipes inside a recipe, run one after the other before it. Each is a run of its own, with its own journal."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from mergetool.engine.processes import Team
from mergetool.engine.progress import Teller
from mergetool.errors import at
from mergetool.outputs.parts import keep_parts, remove_part
from mergetool.outputs.push import read_lock
from mergetool.outputs.result import Result
from mergetool.outputs.staging import is_made, needed_parts
from mergetool.planning import Plan
from mergetool.planning.inner import inside, needed


def make_inner(plan: Plan, make: Callable[[Plan], Result | None], teller: Teller, team: Team) -> dict[str, Result]:
    """Make all results that are missing, and remove each when nothing reads it any more. Returns what was made now."""
    assert plan.output is not None
    inner = inside(plan)
    done: dict[str, Result] = {}
    while (name := team.all_gather(_following(plan) if team.leads else None)[0]) is not None:
        each = inner[name]
        method = each.recipe.method.method_name()
        teller.say(f"first {name} ({len(done) + 1}): {method} of {', '.join(each.recipe.models)}")
        with at(name):
            result = make(each)
        if result is not None:
            done[name] = result
        if team.leads:
            keep_parts(plan.output, needed_parts(plan))
    return done


def _following(plan: Plan) -> str | None:
    """The next result to make, in a place that is free for it."""
    name, each = next(((name, each) for name, each in needed(plan, is_made) if not is_made(each)), (None, None))
    if each is not None and each.output is not None:
        remove_part(each.output)
    return name


def known_digests(plan: Plan) -> dict[str, str]:
    """SHA-256 of input files, by path, as the recipes inside a plan found them."""
    digests: dict[str, str] = {}
    for each in plan.inner.values():
        assert each.output is not None
        inputs = read_lock(each.output)["inputs"]
        for name, stamps in each.stamps.items():
            digests |= {str(stamp.path): file["sha256"] for stamp, file in zip(stamps, inputs[name], strict=True)}
    return digests


def with_inner_results(result: Result | None, done: Mapping[str, Result]) -> Result | None:
    """What a run reports, with what was made for it."""
    if result is None or not done:
        return result
    notes = {f"{name}: {note}": count for name, each in done.items() for note, count in each.notes.items()}
    return replace(
        result,
        bytes_read=result.bytes_read + sum(each.bytes_read for each in done.values()),
        bytes_written=result.bytes_written + sum(each.bytes_written for each in done.values()),
        notes={**notes, **result.notes},
    )
