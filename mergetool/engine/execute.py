"""Run a plan: from opened sources to a finished folder, in a way that can be killed at any moment.

claim        lock NAME.partial.journal, create NAME.partial, reserve the output files
work         threads take jobs: hash inputs, survey, merge, sync and hash finished files
finish       index, config, tokenizer, card, lock file; then one rename
"""

import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from mergetool.engine.claim import Claim, done_before
from mergetool.engine.deal import deal
from mergetool.engine.jobs import Jobs
from mergetool.engine.locked import Locked
from mergetool.engine.processes import Team, joined
from mergetool.engine.provenance import finish
from mergetool.engine.pulse import Pulse
from mergetool.engine.push import push_result, push_target
from mergetool.engine.result import Result
from mergetool.engine.schedule import Schedule
from mergetool.engine.trust import check_trust
from mergetool.errors import MergeError, MergetoolError, OutputError, PlanError, SourceError
from mergetool.methods.base import BundleMethod
from mergetool.planner import Plan, make_plan
from mergetool.planner.estimate import Costs, check_disk, estimate
from mergetool.planner.lookup import Lookup
from mergetool.recipe.model import Recipe
from mergetool.tensors.writer import SlotWriter


class Progress(Protocol):
    """What a run tells while it works. Calls come from several threads, one at a time."""

    def start(self, total_bytes: int, label: str) -> None: ...
    def advance(self, num_bytes: int) -> None: ...
    def say(self, text: str) -> None: ...
    def stop(self) -> None: ...


class Silent:
    """No progress at all."""

    def start(self, total_bytes: int, label: str) -> None:
        pass

    def advance(self, num_bytes: int) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def stop(self) -> None:
        pass


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
    """Where factors of task vectors are kept between runs."""
    fork: bool = False
    """Let workers live in processes of their own where that is faster; for programs without threads of their own."""
    trust_code: bool = False
    """Whether Python code that the recipe names may be run."""
    push: bool | None = None
    """Whether to push to `output.hub`; None: if the recipe has one."""
    locked: bool = False
    """Whether recipe and inputs must be what an earlier lock says."""


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
    found: Result = team.exchange(result)[0]
    return found


def _done_before(plan: Plan, flags: Flags, progress: Progress, team: Team) -> Result | None:
    """The result of an earlier run of the same command that could not say that it was done."""
    assert plan.output is not None
    asked = team.leads and flags.resume
    if not team.exchange(asked and done_before(plan, plan.output, overwrite=flags.overwrite))[0]:
        return None
    progress.say(f"done already: {plan.output} is what this recipe makes of these inputs (--overwrite makes it again)")
    return Result(plan.output, 0.0, 0, plan.bytes_out, 0, len(plan.steps), resumed=True)


def _claim_and_run(
    plan: Plan, costs: Costs, digests: dict[str, str], flags: Flags, progress: Progress, team: Team
) -> Result | None:
    claim = team.leader_first(lambda: _claim(plan, flags, team))
    try:
        claim.journal.include(team.exchange(claim.journal.done))
        claim.journal.done.hashes.update(digests)
        return _run_claimed(plan, claim, costs, flags, progress, team)
    finally:
        progress.stop()
        claim.release()
        for source in plan.sources.values():
            source.close()


def _claim(plan: Plan, flags: Flags, team: Team) -> Claim:
    assert plan.output is not None
    if not team.leads:
        return Claim.joined(plan, plan.output, team.rank)
    return Claim(plan, plan.output, overwrite=flags.overwrite, resume=flags.resume)


def _prepare(recipe: Recipe, flags: Flags, progress: Progress, team: Team) -> tuple[Plan, Costs, dict[str, str]]:
    """The plan, and every file that it needs here. What is wrong is found from headers, before any download.

    Also SHA-256 of the input files that are known already, by path.
    """
    lookup = Lookup(recipe.folder)
    output = flags.output.absolute() if flags.output else None
    plan = make_plan(recipe, output, lookup=lookup, whole=True)
    if plan.output is None:
        raise OutputError("nowhere to write to", recipe.name, "add output: {path: FOLDER} or give -o FOLDER")
    if flags.cache is not None and not recipe.method.uses_factors:
        what = f"{recipe.method.method_name()} computes no factors, so this would have no effect"
        raise PlanError(what, "--cache", "leave it out")
    if isinstance(recipe.method, BundleMethod) and flags.device not in ("auto", "cpu"):
        what = f"{recipe.method.method_name()} computes its factors on the CPU, so this would have no effect"
        raise PlanError(what, "--device", "leave it out")
    costs = estimate(plan, workers=flags.workers, memory=flags.memory, processes=team.local_size)
    for warning in plan.warnings:
        progress.say(f"warning: {warning}")
    locked = Locked(plan) if flags.locked and team.leads else None
    if locked is not None:
        locked.check_headers(plan)
    if plan.bytes_missing:
        lookup.fetch(progress.say)
        plan = make_plan(recipe, output, lookup=lookup, whole=True)
    return plan, costs, {} if locked is None else locked.check_contents(plan, progress.say)


def _run_claimed(plan: Plan, claim: Claim, costs: Costs, flags: Flags, progress: Progress, team: Team) -> Result | None:
    """The result; None where this process does not lead."""
    try:
        if team.exchange(claim.finished)[0]:  # killed between the last byte and the rename
            if team.leads:
                claim.publish()
            progress.say("done already: all was written, only the name of the result was missing")
            return Result(claim.output, 0.0, 0, plan.bytes_out, 0, len(plan.steps), resumed=True)
        if isinstance(plan.recipe.method, BundleMethod):
            from mergetool.engine.bundling import run_bundle

            return run_bundle(plan, claim, costs.workers, cache=flags.cache, say=progress.say, team=team)
        return _merge(plan, claim, costs, flags, progress, team)
    except Exception as found:
        error = team.agree(found)  # and the others have stopped
        if team.leads and _is_vain(error, claim):
            claim.discard()
        raise error from found.__cause__


def _is_vain(error: BaseException, claim: Claim) -> bool:
    """Whether nothing of what was done is worth resuming."""
    if not isinstance(error, MergetoolError):
        return False
    refused = isinstance(error, PlanError | SourceError) and not claim.journal.worked
    return refused or isinstance(error, MergeError) or bool(claim.changed_inputs())


def _merge(plan: Plan, claim: Claim, costs: Costs, flags: Flags, progress: Progress, team: Team) -> Result | None:
    started = time.monotonic()
    if claim.journal.resumed:
        progress.say(f"resuming: {len(claim.journal.done.units)} units are done already")
    writer = team.leader_first(lambda: _open_writer(plan, claim))
    try:
        schedule = Schedule(costs.step_memory, costs.workers)
        jobs = Jobs(plan, writer, claim.journal, schedule, teller=progress, share=deal(plan, team))
        _work(jobs, schedule, Pulse(jobs, schedule, writer, claim, team), claim, costs, flags)
    finally:
        writer.close()
    records = team.exchange(jobs.record)
    if not team.leads:
        return None
    seconds = claim.journal.done.seconds + time.monotonic() - started
    result = finish(plan, claim, records, seconds)
    for word in result.warnings[len(plan.warnings) :]:
        progress.say(f"warning: {word}")
    claim.publish()
    return result


def _open_writer(plan: Plan, claim: Claim) -> SlotWriter:
    """The output files at their final size. A disk that is too small for them is left as it was."""
    try:
        if not claim.journal.resumed:
            check_disk(plan, claim.output)
        return SlotWriter(claim.partial, plan.shards)
    except OutputError:
        if not claim.journal.resumed:
            claim.discard()
        raise


def _work(jobs: Jobs, schedule: Schedule, pulse: Pulse, claim: Claim, costs: Costs, flags: Flags) -> None:
    jobs.queue_early()
    threads = [threading.Thread(target=schedule.work, daemon=True) for _ in range(costs.workers)]
    for thread in threads:
        thread.start()
    try:
        with jobs.crew.ready(flags.device, flags.cache):
            jobs.fit(claim.partial)
            if flags.fork:
                jobs.fork(costs.workers)
            jobs.queue_all()
            pulse.start()
            schedule.wait()
    except BaseException as error:
        schedule.stop(error)
        raise
    finally:
        for thread in threads:
            thread.join()
        jobs.close()
        pulse.stop()
    if schedule.error is not None:
        raise schedule.error
