"""Run a plan: from opened sources to a finished folder, in a way that can be killed at any moment.

claim        create NAME.partial, lock its journal, reserve the output files
work         threads take jobs: hash inputs, survey, merge, sync and hash finished files
finish       index, config, tokenizer, card, lock file; then one rename
"""

import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from mergetool.engine.claim import Claim
from mergetool.engine.jobs import Jobs
from mergetool.engine.locked import Locked
from mergetool.engine.provenance import finish
from mergetool.engine.push import push_result, push_target
from mergetool.engine.result import Result
from mergetool.engine.schedule import Schedule
from mergetool.engine.trust import check_trust
from mergetool.errors import MergeError, MergetoolError, OutputError, PlanError, SourceError
from mergetool.methods.base import BundleMethod
from mergetool.planner import Plan, make_plan
from mergetool.planner.estimate import Costs, check_disk, estimate
from mergetool.planner.library import Library
from mergetool.recipe.model import Recipe
from mergetool.tensors.writer import SlotWriter

_SYNC_SECONDS = 0.5


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


def run_recipe(recipe: Recipe, flags: Flags | None = None, progress: Progress | None = None) -> Result:
    """Plan and run a recipe. Raises any MergetoolError; the output is then incomplete and not under its name."""
    flags, progress = flags or Flags(), progress or Silent()
    check_trust(recipe, trusted=flags.trust_code)
    target = push_target(recipe, flags.push)
    plan, costs, digests = _prepare(recipe, flags, progress)
    assert plan.output is not None
    claim = Claim(plan, plan.output, overwrite=flags.overwrite, resume=flags.resume)
    claim.journal.done.hashes.update(digests)
    try:
        result = _run_claimed(plan, claim, costs, flags, progress)
    finally:
        progress.stop()
        claim.release()
        for source in plan.sources.values():
            source.close()
    return result if target is None else replace(result, pushed=push_result(result.path, target))


def _prepare(recipe: Recipe, flags: Flags, progress: Progress) -> tuple[Plan, Costs, dict[str, str]]:
    """The plan, and every file that it needs here. What is wrong is found from headers, before any download.

    Also SHA-256 of the input files that are known already, by path.
    """
    library = Library(recipe.folder)
    output = flags.output.absolute() if flags.output else None
    plan = make_plan(recipe, output, library=library)
    if plan.output is None:
        raise OutputError("nowhere to write to", recipe.name, "add output: {path: FOLDER} or give -o FOLDER")
    if flags.cache is not None and not recipe.method.uses_factors:
        what = f"{recipe.method.method_name()} computes no factors, so this would have no effect"
        raise PlanError(what, "--cache", "leave it out")
    costs = estimate(plan, workers=flags.workers, memory=flags.memory)
    for warning in plan.warnings:
        progress.say(f"warning: {warning}")
    locked = Locked(plan) if flags.locked else None
    if locked is not None:
        locked.check_headers(plan)
    if plan.bytes_missing:
        library.fetch(progress.say)
        plan = make_plan(recipe, output, library=library)
    return plan, costs, {} if locked is None else locked.check_contents(plan, progress.say)


def _run_claimed(plan: Plan, claim: Claim, costs: Costs, flags: Flags, progress: Progress) -> Result:
    try:
        if claim.finished:  # killed between the last byte and the rename
            claim.publish()
            return Result(claim.output, 0.0, 0, plan.bytes_out, 0, len(plan.steps), resumed=True)
        if isinstance(plan.recipe.method, BundleMethod):
            from mergetool.engine.bundling import run_bundle

            return run_bundle(plan, claim, costs.workers, flags.cache, progress.say)
        return _merge(plan, claim, costs, flags, progress)
    except MergetoolError as error:
        refused = isinstance(error, PlanError | SourceError) and not claim.journal.worked
        if refused or isinstance(error, MergeError) or claim.changed_inputs():  # nothing here is worth resuming
            claim.discard()
        raise


def _merge(plan: Plan, claim: Claim, costs: Costs, flags: Flags, progress: Progress) -> Result:
    started = time.monotonic()
    if claim.journal.resumed:
        progress.say(f"resuming: {len(claim.journal.done.units)} units are done already")
    writer = _open_writer(plan, claim)
    try:
        schedule = Schedule(costs.step_memory, costs.workers)
        jobs = Jobs(plan, writer, claim.journal, schedule, progress)
        _work(jobs, schedule, writer, claim, costs, flags, started)
    finally:
        writer.close()
    seconds = claim.journal.done.seconds + time.monotonic() - started
    result = finish(plan, claim, jobs.record, seconds)
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


def _work(
    jobs: Jobs, schedule: Schedule, writer: SlotWriter, claim: Claim, costs: Costs, flags: Flags, started: float
) -> None:
    jobs.queue_early()
    threads = [threading.Thread(target=schedule.work, daemon=True) for _ in range(costs.workers)]
    ended = threading.Event()
    threads.append(threading.Thread(target=_sync_often, args=(schedule, writer, claim, ended, started), daemon=True))
    for thread in threads:
        thread.start()
    try:
        with jobs.torch_ready(flags.device, costs.workers, flags.cache):
            jobs.fit(claim.partial)
            if flags.fork:
                jobs.fork(costs.workers)
            jobs.queue_all()
            schedule.close()
            schedule.wait()
    except BaseException as error:
        schedule.stop(error)
        raise
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        jobs.close()
    if schedule.error is not None:
        raise schedule.error


def _sync_often(schedule: Schedule, writer: SlotWriter, claim: Claim, ended: threading.Event, started: float) -> None:
    """Keep the disk busy while others compute, and bound what a power cut can undo."""
    before = claim.journal.done.seconds
    marker = 0
    while not ended.wait(_SYNC_SECONDS):
        try:
            if claim.journal.mark() == marker:
                continue
            marker = claim.journal.mark()
            for shard in range(writer.num_files):
                writer.sync(shard)
            claim.journal.synced(marker, before + time.monotonic() - started)
            marker = claim.journal.mark()
        except BaseException as error:
            schedule.stop(error)
            return
