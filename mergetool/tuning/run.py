"""Run any recipe: a search first, where it asks for one, then the merge that it found."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergetool.engine import Flags, Progress, Result
from mergetool.engine import run_recipe as run_plain
from mergetool.engine.processes import Team, joined, leads
from mergetool.engine.progress import Silent
from mergetool.engine.run import run_inner
from mergetool.errors import MergeError, OutputError, PlanError
from mergetool.outputs.journal import journal_path
from mergetool.outputs.parts import check_parts
from mergetool.outputs.push import push_result, push_target
from mergetool.outputs.staging import check_output
from mergetool.planning import Plan
from mergetool.planning.build import make_plan
from mergetool.planning.sources import Lookup, pinned
from mergetool.recipe.schema import Recipe
from mergetool.tensors.folder import open_model
from mergetool.tensors.writer import partial_path
from mergetool.tuning.placing import device_of

if TYPE_CHECKING:
    from mergetool.tuning.session import Winner


def run_recipe(recipe: Recipe, flags: Flags | None = None, progress: Progress | None = None) -> Result:
    """Plan and run a recipe of any method. Raises any MergetoolError."""
    flags, progress = flags or Flags(), progress or Silent()
    if flags.device_map is not None:
        _check_networks(recipe, flags)
    if not recipe.evaluate:
        return _merged(recipe, flags, progress)
    with joined() as team:
        target = push_target(recipe, flags.push) if team.leads else None
        result = _merged(recipe, replace(flags, push=False), progress)
    result = _evaluated(recipe, flags, result)
    return result if target is None else replace(result, pushed=push_result(result.path, target))


def _check_networks(recipe: Recipe, flags: Flags) -> None:
    """Raise PlanError where no network is run, or none can be run as flags say."""
    measures = any(each.measures for each in (recipe, *recipe.inner.values()))
    if not recipe.method.searches and not recipe.evaluate and not measures:
        what = f"{recipe.method.method_name()} runs no network, so this would have no effect"
        raise PlanError(what, "--device-map", "leave it out")
    device_of(flags)
    _ = flags.spread


def _merged(recipe: Recipe, flags: Flags, progress: Progress) -> Result:
    """The result, before it is scored."""
    if not recipe.method.searches:
        return run_plain(recipe, flags, progress)
    from mergetool.tuning.session import search

    with joined() as team:
        output = _output(recipe, flags)
        flags = replace(flags, device=device_of(flags))  # what is searched there is merged there
        if team.leads:
            push_target(recipe, flags.push)  # that it cannot be pushed is better known now than after the search
        asked = team.leader_first(lambda: pinned(recipe))  # what is searched is merged, however long it takes
        teller = progress if team.leads else Silent()
        inner = _made_before(asked, output, flags, teller, team)
        winner = search(asked, inner, search_folder(output), flags, teller, team)
        merged = run_plain(*_winner(winner, replace(flags, output=output)), progress, winner.warnings)
        if team.leads:
            _check_saved(merged.path, winner.digest)
        team.all_gather(None)
        return replace(merged, notes={**dict.fromkeys(winner.notes, 1), **merged.notes})


def _made_before(recipe: Recipe, output: Path, flags: Flags, progress: Progress, team: Team) -> Mapping[str, Plan]:
    """The plans of the recipes inside this one, whose results are there now, where the merge will look for them."""
    if not recipe.inner:
        return {}

    def planned() -> Plan:
        check_parts(output)
        lookup = Lookup(recipe.folder)
        plan = make_plan(recipe, output, lookup=lookup, whole=True)
        if not plan.bytes_missing:
            return plan
        lookup.fetch(progress.say)
        return make_plan(recipe, output, lookup=lookup, whole=True)

    plan = team.leader_first(planned)
    run_inner(plan, {}, flags, progress, team)
    return plan.inner


def search_folder(output: Path) -> Path:
    """Where a search is kept: beside its result."""
    return output.with_name(f"{output.name}.search")


def _evaluated(recipe: Recipe, flags: Flags, result: Result) -> Result:
    """The result with its scores among the notes, in the card, and item by item beside it; it is pushed after that."""
    if not leads():
        return result
    from mergetool.evaluate.assess import assess
    from mergetool.outputs.scored import tell_scores
    from mergetool.outputs.scores import keep_scores

    found = assess(
        result.path,
        recipe.evaluate,
        folder=recipe.folder,
        device=device_of(flags),
        cache=flags.cache,
        trust_code=flags.trust_code,
        spread=flags.spread,
    )
    keep_scores(result.path, found)
    tell_scores(result.path, found)
    facts = found.facts()["tasks"]
    told = (f"{f['task']}: {f['metric']} {f['score']:.4f} ({f['low']:.4f} to {f['high']:.4f})" for f in facts)
    return replace(result, notes={**result.notes, **dict.fromkeys(told, 1)})


def _winner(winner: "Winner", flags: Flags) -> tuple[Recipe, Flags]:
    """The recipe that merges what was found, and the flags for it."""
    return winner.recipe, replace(flags, cache=flags.cache if winner.recipe.method.uses_factors else None)


def _check_saved(path: Path, digest: str | None) -> None:
    """What was saved must be what was scored."""
    from mergetool.tuning.in_memory import saved_digest

    source = open_model(path)
    if digest is not None and saved_digest(source) != digest:
        what = "the weights that were saved are not those that were scored"
        raise MergeError(what, str(path), "run the search on the device that merges: --device cpu")
    source.close()


def _output(recipe: Recipe, flags: Flags) -> Path:
    output = flags.output.absolute() if flags.output else None
    if output is None and recipe.output.path is not None:
        output = recipe.path_of(recipe.output.path)
    if output is None:
        raise OutputError("nowhere to write to", recipe.name, "add output: {path: FOLDER} or give -o FOLDER")
    with suppress(OSError):  # a name too long
        if flags.resume and journal_path(partial_path(output)).is_file():  # the merge of what was found was killed
            return output
    _check_output(output, flags)
    return output


def _check_output(output: Path, flags: Flags) -> None:
    try:
        check_output(output, overwrite=flags.overwrite)
    except OutputError as error:
        if search_folder(output).is_dir() and "--overwrite" in error.fix:
            error.fix += " (answers that the search keeps are not asked again)"
        raise
