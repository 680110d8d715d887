"""Run a plan: from opened sources to a finished folder, in a way that can be killed at any moment.

staging        lock NAME.partial.journal, create NAME.partial, reserve the output files
work         threads take jobs: hash inputs, count, merge, sync and hash finished files
finish       index, config, tokenizer, card, lock file; then one rename
"""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mergetool.checkpoints.vocabulary import forget_tokens
from mergetool.engine.choice import settled
from mergetool.engine.context import Context
from mergetool.engine.hashing import Hashes
from mergetool.engine.inner import known_digests, make_inner, with_inner_results
from mergetool.engine.partition import partition
from mergetool.engine.pool import WorkerPool
from mergetool.engine.processes import Team, joined
from mergetool.engine.progress import Progress, Silent
from mergetool.engine.schedule import Schedule
from mergetool.engine.stages import run_stages
from mergetool.engine.sync import SyncLoop
from mergetool.engine.trust import check_trust
from mergetool.errors import MergeError, MergetoolError, OutputError, PlanError, SourceError
from mergetool.outputs.journal import Journal
from mergetool.outputs.lock_check import LockCheck
from mergetool.outputs.output import finish, output_of
from mergetool.outputs.push import push_result, push_target
from mergetool.outputs.record import Record
from mergetool.outputs.result import Result
from mergetool.outputs.staging import Staging, done_before, is_made
from mergetool.planning import Plan, make_plan
from mergetool.planning.cost import Costs, check_disk
from mergetool.planning.inner import inside
from mergetool.planning.sources import Lookup
from mergetool.recipe.schema import Recipe
from mergetool.tensors.writer import SlotWriter

if TYPE_CHECKING:
    from mergetool.networks.spread import Spread

_WORTH_FORKING = 1 << 21
"""Elements below which threads are done before the processes are there."""


@dataclass(frozen=True)
class Flags:
    """Where and how a run runs; nothing here changes the result."""

    output: Path | None = None
    device: str = "auto"
    workers: int | None = None
    memory: int | None = None
    overwrite: bool = False
    resume: bool = True
    cache: Path | None = None
    """Where factors of task vectors, and statistics, are kept between runs."""
    fork: bool = False
    """Let workers live in processes of their own where that is faster; for programs without threads of their own."""
    trust_code: bool = False
    """Whether Python code that the recipe names may be run."""
    push: bool | None = None
    """Whether to push to `output.hub`; None: if the recipe has one."""
    locked: bool = False
    """Whether recipe and inputs must be what an earlier lock says."""
    device_map: str | Mapping[str, str | int] | None = None
    """How networks that are run are dealt over devices, memory (at most `memory`) and the disk."""

    @property
    def spread(self) -> "Spread | None":
        """How networks are dealt out; None: they are on one device. Raises PlanError for an unknown way."""
        from mergetool.networks.spread import Spread

        return None if self.device_map is None else Spread(self.device_map, self.memory)


def run_recipe(
    recipe: Recipe, flags: Flags | None = None, progress: Progress | None = None, remarks: tuple[str, ...] = ()
) -> Result:
    """Plan and run a recipe. Raises any MergetoolError; the output is then incomplete and not under its name.

    `remarks` are warnings of whoever made the recipe; they stand in the lock, too.
    Where a launcher has started several processes, they share the work, and all of them return the result.
    """
    flags, progress = flags or Flags(), progress or Silent()
    check_trust(recipe, trusted=flags.trust_code)
    with joined() as team:
        return _run(recipe, flags, progress if team.leads else Silent(), team, remarks)


def _run(recipe: Recipe, flags: Flags, progress: Progress, team: Team, remarks: tuple[str, ...]) -> Result:
    target = push_target(recipe, flags.push) if team.leads else None
    plan, costs, digests = team.leader_first(lambda: _prepare(recipe, flags, progress, team))
    for remark in remarks:
        progress.say(f"warning: {remark}")
    plan = replace(plan, warnings=(*plan.warnings, *remarks))
    result = _done_before(plan, flags, progress, team)
    if result is None:
        result = _claim_and_run(plan, costs, digests, flags, progress, team)
    if result is not None and target is not None:
        result = replace(result, pushed=push_result(result.path, target))
    shared: Result = team.all_gather(result)[0]
    return shared


def _done_before(plan: Plan, flags: Flags, progress: Progress, team: Team) -> Result | None:
    """The result of an earlier run of the same command that could not say that it was done."""
    assert plan.output is not None
    asked = team.leads and flags.resume
    if not team.all_gather(asked and done_before(plan, plan.output, overwrite=flags.overwrite))[0]:
        return None
    progress.say(f"done already: {plan.output} is what this recipe makes of these inputs (--overwrite makes it again)")
    return Result(plan.output, 0.0, 0, plan.bytes_out, 0, plan.num_tensors, resumed=True)


def _claim_and_run(
    plan: Plan, costs: Costs, digests: dict[str, str], flags: Flags, progress: Progress, team: Team
) -> Result | None:
    staging = team.leader_first(lambda: _claim(plan, flags, team))
    try:
        staging.journal.include(team.all_gather(staging.journal.done))
        staging.journal.done.hashes.update(digests)
        return _run_claimed(plan, staging, costs, flags, progress, team)
    finally:
        progress.stop()
        staging.release()
        for source in plan.sources.values():
            source.close()


def _claim(plan: Plan, flags: Flags, team: Team) -> Staging:
    assert plan.output is not None
    if not team.leads:
        return Staging.joined(plan, plan.output, team.rank)
    replaces = plan.recipe.past.place == plan.output
    return Staging(plan, plan.output, overwrite=flags.overwrite or replaces, resume=flags.resume, in_place=replaces)


def _prepare(recipe: Recipe, flags: Flags, progress: Progress, team: Team) -> tuple[Plan, Costs, dict[str, str]]:
    """The plan, and every file that it needs here. What is wrong is found from headers, before any download.

    Also SHA-256 of the input files that are known already, by path.
    """
    lookup = Lookup(recipe.folder)
    output = flags.output.absolute() if flags.output else None
    plan = make_plan(recipe, output, lookup=lookup, whole=True)
    if plan.output is None:
        raise OutputError("nowhere to write to", recipe.name, "add output: {path: FOLDER} or give -o FOLDER")
    recipes = [each.recipe for each in (plan, *inside(plan).values())]
    if flags.cache is not None and not any(each.method.uses_factors or each.measures for each in recipes):
        what = f"{recipe.method.method_name()} computes no factors and no statistics, so this would have no effect"
        raise PlanError(what, "--cache", "leave it out")
    costs = _settled(plan, flags, team)
    for warning in plan.warnings:
        progress.say(f"warning: {warning}")
    locked = LockCheck(plan) if flags.locked and team.leads else None
    if locked is not None:
        locked.check_headers(plan)
    if plan.bytes_missing:
        lookup.fetch(progress.say)
        plan = make_plan(recipe, output, lookup=lookup, whole=True)
    if plan.words.texts is not None:  # else they are read again in the end
        forget_tokens()
    return plan, costs, recipe.past.digests if locked is None else locked.check_contents(plan, progress.say)


def _settled(plan: Plan, flags: Flags, team: Team) -> Costs:
    return settled(plan, flags.device, workers=flags.workers, memory=flags.memory, processes=team.local_size)


def _run_claimed(
    plan: Plan, staging: Staging, costs: Costs, flags: Flags, progress: Progress, team: Team
) -> Result | None:
    """The result; None where this process does not lead."""
    try:
        if team.all_gather(staging.finished)[0]:  # killed between the last byte and the rename
            if team.leads:
                staging.publish()
            progress.say("done already: all was written, only the name of the result was missing")
            return Result(staging.output, 0.0, 0, plan.bytes_out, 0, plan.num_tensors, resumed=True)
        done = _make_inner(plan, staging, flags, progress, team)
        return with_inner_results(_merge(plan, staging, costs, flags, progress, team, done), done)
    except Exception as own:
        error = team.agree(own)  # and the others have stopped
        if team.leads and _is_vain(error, staging):
            staging.discard()
        raise error from own.__cause__


def _make_inner(plan: Plan, staging: Staging, flags: Flags, progress: Progress, team: Team) -> dict[str, Result]:
    """Run the recipes inside this one whose results are not there yet. What they learnt of their inputs is kept."""
    if not plan.inner:
        return {}
    team.leader_first(lambda: _check_room(plan, staging))
    done = run_inner(plan, dict(staging.journal.done.hashes), flags, progress, team)
    staging.journal.done.hashes.update(known_digests(plan))
    return done


def run_inner(plan: Plan, digests: dict[str, str], flags: Flags, progress: Progress, team: Team) -> dict[str, Result]:
    """Run recipes inside a plan, into the folder of its parts. `digests` of input files are taken as they are."""

    def make(inner: Plan) -> Result | None:
        costs = _settled(inner, flags, team)
        asked = replace(flags, output=inner.output, overwrite=False, resume=True)
        return _claim_and_run(inner, costs, digests, asked, progress, team)

    return make_inner(plan, make, progress, team)


def _check_room(plan: Plan, staging: Staging) -> None:
    """Refuse a disk that is too small, and leave it as it was."""
    try:
        check_disk(plan, staging.output, is_made)
    except OutputError:
        if not staging.has_work:
            staging.discard()
        raise


def _is_vain(error: BaseException, staging: Staging) -> bool:
    """Whether nothing of what was done is worth resuming."""
    if not isinstance(error, MergetoolError):
        return False
    refused = isinstance(error, PlanError | SourceError) and not staging.has_work
    return refused or isinstance(error, MergeError) or bool(staging.changed_inputs())


def _merge(
    plan: Plan,
    staging: Staging,
    costs: Costs,
    flags: Flags,
    progress: Progress,
    team: Team,
    done: Mapping[str, Result],
) -> Result | None:
    started = time.monotonic()
    if staging.journal.resumed:
        progress.say(f"resuming: {len(staging.journal.done.units)} units are done already")
    writer = team.leader_first(lambda: _open_writer(plan, staging))
    try:
        run = _context(plan, writer, staging.journal, costs, progress, team)
        run.cache, run.room, run.spread = flags.cache, costs.room, flags.spread
        _work(run, writer, costs, flags, staging.journal)
    finally:
        writer.close()
    records = team.all_gather(run.record)
    if not team.leads:
        return None
    seconds = staging.journal.done.seconds + time.monotonic() - started + sum(each.seconds for each in done.values())
    result = finish(plan, staging, records, seconds)
    for word in result.warnings[len(plan.warnings) :]:
        progress.say(f"warning: {word}")
    staging.publish()
    return result


def _open_writer(plan: Plan, staging: Staging) -> SlotWriter:
    """The output files at their final size. A disk that is too small for them is left as it was."""
    try:
        if not staging.journal.resumed:
            check_disk(plan, staging.output)
        return SlotWriter(staging.partial, output_of(plan).slot_files(plan))
    except OutputError:
        if not staging.journal.resumed:
            staging.discard()
        raise


def _context(plan: Plan, writer: SlotWriter, journal: Journal, costs: Costs, progress: Progress, team: Team) -> Context:
    """What the stages of this run share."""
    schedule = Schedule(costs.step_memory, costs.workers)
    mine = partition(plan, team)
    record = Record(inputs=dict(journal.done.hashes), notes={n: list(notes) for n, notes in journal.done.notes.items()})
    hashes = Hashes(plan, writer, journal, schedule, record, mine)
    pool = WorkerPool(plan, writer)
    return Context(plan, writer, journal, schedule, pool, mine, progress, record, hashes)


def _work(run: Context, writer: SlotWriter, costs: Costs, flags: Flags, journal: Journal) -> None:
    """All stages, by threads that hash what is known to be needed while the rest gets ready."""
    run.hashes.begin(run.to_do)
    with ExitStack() as beside:
        loop = partial(SyncLoop, schedule=run.schedule, writer=writer, journal=journal, team=run.team)
        run.begin_beside = lambda merging: beside.enter_context(loop(merging))
        try:
            with run.schedule.threads():
                _stages(run, costs, flags, journal)
        finally:
            run.record.workers_memory = run.pool.close()


def _stages(run: Context, costs: Costs, flags: Flags, journal: Journal) -> None:
    device = costs.device if run.team.all_gather(costs.device)[0] != "cpu" else "cpu"
    workers = costs.workers * run.team.local_size
    with run.pool.ready(device, flags.cache if run.plan.recipe.method.uses_factors else None, workers):
        if run.pool.memory is not None:
            run.schedule.limit(run.pool.memory)
        run.record.device, run.record.why = run.pool.device, costs.why
        if run.pool.device != "cpu" or costs.why:
            run.teller.say(f"merging on {run.pool.device}{f' ({costs.why})' if costs.why else ''}")
        fork = partial(_fork, run, costs.workers, journal) if flags.fork else lambda: None
        run_stages(run, fork)
        run.schedule.close()
        run.schedule.wait()


def _fork(run: Context, count: int, journal: Journal) -> None:
    """Give workers processes of their own, where there is enough to do.

    Not beside other processes of a team: threads that talk to those are not to be forked.
    """
    units = run.to_do
    elements = sum(step.spec.num_elements for step in run.plan.steps if units[step.index])
    if run.team.size == 1 and 1 < count < sum(units.values()) and elements >= _WORTH_FORKING:
        refused = run.pool.fork(count, journal.fileno())
        if refused is not None:
            run.teller.say(f"threads do the work of the workers: no process could be started ({refused.strerror})")
