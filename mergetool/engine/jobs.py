"""From a plan to jobs: what is still to do, what each job records, and which jobs it sets free.

input file      hashed early when all inputs fit in the page cache, else when the last of its tensors was read
step            surveys first if its method asks for them, then its units are merged
model           where a fitted method has something to finish: tensors replaced when every step is merged
output file     hashed from its front on as units are finished, while they are in the page cache; then synced
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mergetool.engine.incremental_hash import IncrementalHash
from mergetool.engine.partition import Partition
from mergetool.engine.pool import WorkerPool
from mergetool.engine.schedule import Job, Schedule
from mergetool.methods.base import Stats
from mergetool.methods.group import Note
from mergetool.outputs.journal import Journal
from mergetool.outputs.record import Record, joined_counts
from mergetool.planning import Plan, Step
from mergetool.planning.cost import available_memory, step_memory
from mergetool.planning.graph import UNIT_ELEMENTS
from mergetool.tensors.digests import remembered_sha256
from mergetool.tensors.source import SafetensorsSource
from mergetool.tensors.writer import SlotWriter

if TYPE_CHECKING:
    from torch import Tensor

    from mergetool.engine.fit import Fit

_WHOLE_MODEL = None
"""Scope of a survey over all tensors; every other scope is a tensor's name."""


class Teller(Protocol):
    """The part of a progress display that jobs talk to."""

    def start(self, total_bytes: int, label: str) -> None: ...
    def advance(self, num_bytes: int) -> None: ...
    def say(self, text: str) -> None: ...


@dataclass
class _Scope:
    """One survey under way: over one step, or over all steps that share it."""

    survey: Any
    steps: list[Step]
    partial: "list[Tensor | None]" = field(default_factory=list)
    """Counts of each piece, in plan order; whole numbers are added to the first at once."""
    waiting: int = 0


class Jobs:
    """Makes the jobs of one run and keeps their records. `after` callbacks run one at a time."""

    def __init__(
        self, plan: Plan, writer: SlotWriter, journal: Journal, schedule: Schedule, *, teller: Teller, share: Partition
    ) -> None:
        self._plan = plan
        self.crew = WorkerPool(plan, writer)
        self._share = share
        self._writer = writer
        self._journal = journal
        self._schedule = schedule
        self._teller = teller
        self._fit: Fit | None = None
        done = journal.done
        self.record = Record(inputs=dict(done.hashes), notes={name: list(notes) for name, notes in done.notes.items()})
        self._stops = {(step.index, start): stop for step in plan.steps for start, stop in step.pieces(UNIT_ELEMENTS)}
        self._left = self._stops.keys() - done.units  # units that no process has written yet
        self.finished: list[tuple[int, int]] = []  # units that this process has written, in order
        self._todo = {
            step.index: [
                (start, stop)
                for start, stop in step.pieces(UNIT_ELEMENTS)
                if (step.index, start) in self._left and share.has(step.index, start)
            ]
            for step in plan.steps
        }
        self._units_left = sum(len(pieces) for pieces in self._todo.values())
        self._fronts = [
            IncrementalHash(writer.path(index), shard.header.file_size, len(shard.prefix))
            for index, shard in enumerate(plan.shards)
        ]
        for index, start in self._stops.keys() - self._left:
            self._fill(plan.steps[index], start, self._stops[index, start])
        self._files = {str(stamp.path): stamp for stamps in plan.stamps.values() for stamp in stamps}
        self._left_of_file: Counter[str] = Counter()

    # ---------------------------------------------------------------- queueing

    def queue_early(self) -> None:
        """Hash inputs at once where they will stay in the page cache for merging; else after their last use."""
        size = sum(stamp.size for stamp in self._files.values())
        if size > available_memory() // 2:
            for step in self._plan.steps:
                for path in self._paths(step):
                    self._left_of_file[path] += len(self._todo[step.index])
        mine = filter(self._share.hashes_input, self._files)
        self._schedule.add(self._hash_job(path) for path in mine if self._left_of_file[path] == 0)

    def fit(self, folder: Path) -> None:
        """For a method that looks at the whole models first: do so (or take up what a killed run left)."""
        from mergetool.engine.fit import fit

        self.record.device = self.crew.device
        if self.crew.device != "cpu":
            self._teller.say(f"merging on {self.crew.device}")
        team = self._share.team
        with self.crew.resting(team.local_size):
            self._fit = fit(self._plan, folder, self._teller.say, team)
        self._plan = self.crew.plan = self._fit.plan

    def fork(self, count: int) -> None:
        """Give workers processes of their own, where there is enough to do.

        Not beside other processes of a team: threads that talk to those are not to be forked.
        """
        if self._share.team.size == 1 and 1 < count < self._units_left:
            self.crew.fork(count, self._journal.fileno())

    def close(self) -> None:
        """End the processes of workers, when no thread uses them any more."""
        self.record.workers_memory = self.crew.close()

    def queue_all(self) -> None:
        """Queue everything that is still to do, in plan order."""
        self._teller.start(self._plan.bytes_out, "merging")
        self._teller.advance(sum(self._size(*unit) for unit in self._stops.keys() - self._left))
        everywhere = [step for step in self._plan.steps if step.surveyed_together]
        if {step.index for step in everywhere} & {index for index, _ in self._left}:
            self._begin_survey(_WHOLE_MODEL, everywhere, first=False)
        for step in self._plan.steps:
            if self._todo[step.index] and not step.surveyed_together:
                self._begin_survey(step.spec.name, [step], first=False)
        if self._units_left == 0:
            self._all_merged()
        for shard in range(len(self._fronts)):
            self._hash_front(shard)

    def _size(self, index: int, start: int) -> int:
        return self._plan.steps[index].spec.dtype.num_bytes(self._stops[index, start] - start)

    @property
    def complete(self) -> bool:
        """Whether every unit is written, whoever has written it."""
        return not self._left

    def others_merged(self, units: Iterable[tuple[int, int]]) -> None:
        """Other processes have written these units."""
        for index, start in units:
            self._written(self._plan.steps[index], start, self._stops[index, start])
            self._hash_front(self._plan.steps[index].shard)

    def _written(self, step: Step, start: int, stop: int) -> None:
        if (step.index, start) in self._left:
            self._left.discard((step.index, start))
            self._teller.advance(step.spec.dtype.num_bytes(stop - start))
            self._fill(step, start, stop)

    # ---------------------------------------------------------------- surveys

    def _begin_survey(self, scope: str | None, steps: list[Step], *, first: bool) -> None:
        known = self._journal.done.stats.get(scope)
        survey = None
        if known is None and steps[0].method is not None:
            total = sum(step.spec.num_elements for step in steps)
            survey = steps[0].method.survey(steps[0].params, total, self._plan.compute_bits)
        if survey is None:
            self._queue_merges(steps, known or {}, first=first)
        else:
            self._queue_survey(scope, _Scope(survey, steps), first=first)

    def _queue_survey(self, name: str | None, scope: _Scope, *, first: bool) -> None:
        pieces = [(step, *piece) for step in scope.steps for piece in step.pieces(UNIT_ELEMENTS)]
        mine = [(place, piece) for place, piece in enumerate(pieces) if self._share.has(piece[0].index, piece[1])]
        scope.waiting = len(mine)
        scope.partial = [None] * len(pieces)
        jobs = [
            Job(
                run=partial(self._survey, step, start, stop, scope.survey),
                after=partial(self._surveyed, name, scope, place),
                memory=step_memory(self._plan, step),
                hint=partial(self._hint, step, start, stop),
            )
            for place, (step, start, stop) in mine
        ]
        self._schedule.add(jobs, first=first)
        if not mine:
            self._queue_conclusion(name, scope)

    def _survey(self, step: Step, start: int, stop: int, survey: Any) -> tuple[int, "Tensor"]:
        return self._bytes_of(step, start, stop) // survey.one_in, self.crew.mine().survey(step, start, stop, survey)

    def _surveyed(self, name: str | None, scope: _Scope, place: int, result: tuple[int, "Tensor"]) -> None:
        size, counts = result
        self.record.bytes_read += size
        if not counts.is_floating_point() and not scope.survey.joined:  # exact in any order: keep one, not thousands
            place, counts = 0, counts if scope.partial[0] is None else scope.partial[0].add_(counts)
        scope.partial[place] = counts
        scope.waiting -= 1
        if scope.waiting == 0:
            self._queue_conclusion(name, scope)

    def _queue_conclusion(self, name: str | None, scope: _Scope) -> None:
        job = Job(run=partial(self._conclude, name, scope), after=partial(self._concluded, name, scope))
        self._schedule.add([job], first=True)

    def _conclude(self, name: str | None, scope: _Scope) -> Any:
        """What the counts come to: those of all processes, where the whole model is surveyed."""
        from mergetool.engine.worker import combined

        counts = (
            scope.partial if name is not _WHOLE_MODEL else joined_counts(self._share.team.all_gather(scope.partial))
        )
        return scope.survey.conclude(combined(scope.survey, (each for each in counts if each is not None)))

    def _concluded(self, name: str | None, scope: _Scope, conclusion: Any) -> None:
        if isinstance(conclusion, Mapping):
            self._journal.stats(name, conclusion)
            self._queue_merges(scope.steps, conclusion, first=name is not _WHOLE_MODEL)
        else:
            scope.survey = conclusion
            self._queue_survey(name, scope, first=True)

    # ---------------------------------------------------------------- merging

    def _queue_merges(self, steps: list[Step], stats: Stats, *, first: bool) -> None:
        jobs = [
            Job(
                run=partial(self._merge, step, start, stop, stats),
                after=partial(self._merged, step, start, stop),
                memory=step_memory(self._plan, step),
                hint=partial(self._hint, step, start, stop),
            )
            for step in steps
            for start, stop in self._todo[step.index]
        ]
        self._schedule.add(jobs, first=first)

    def _merge(self, step: Step, start: int, stop: int, stats: Stats) -> list[Note]:
        notes = self.crew.mine().merge(step, start, stop, stats)
        self._journal.unit(step.index, start, step.spec.name, notes)
        return notes

    def _merged(self, step: Step, start: int, stop: int, notes: list[Note]) -> None:
        self.record.bytes_read += self._bytes_of(step, start, stop)
        known = self.record.notes.setdefault(step.spec.name, []) if notes else []
        known += [note for note in notes if note not in known]
        self._written(step, start, stop)
        self.finished.append((step.index, start))
        self._units_left -= 1
        if self._units_left == 0:
            self._all_merged()
        self._hash_front(step.shard)
        for path in self._paths(step):
            if path in self._left_of_file:
                self._left_of_file[path] -= 1
                if self._left_of_file[path] == 0 and self._share.hashes_input(path):
                    self._schedule.add([self._hash_job(path)], first=True)

    def _bytes_of(self, step: Step, start: int, stop: int) -> int:
        specs = (self._plan.sources[name].specs[step.spec.name] for name in step.reads)
        return sum(spec.dtype.num_bytes(stop - start) for spec in specs)

    def _hint(self, step: Step, start: int, stop: int) -> None:
        for name in step.reads:
            bits = self._plan.sources[name].specs[step.spec.name].dtype.bits
            self._plan.sources[name].will_need(step.spec.name, start * bits // 8, (stop - start) * bits // 8)

    def _paths(self, step: Step) -> set[str]:
        files = ((self._plan.sources[name], name) for name in step.reads)
        return {str(source.files[source.position(step.spec.name)[0]].path) for source, _ in files if source.files}

    # ---------------------------------------------------------------- files

    def _hash_job(self, path: str) -> Job:
        stamp = self._files[path]
        if path in self.record.inputs:
            return Job(run=lambda: self.record.inputs[path], after=lambda _: None)
        return Job(run=partial(remembered_sha256, stamp.path), after=partial(self._hashed, path), hashes=True)

    def _hashed(self, path: str, digest: str) -> None:
        self.record.inputs[path] = digest
        self._journal.hashed(path, digest)

    def _all_merged(self) -> None:
        if self._fit is not None and self._fit.finishes:
            self._schedule.add([Job(run=self._finish_model, after=self._model_finished)], first=True)

    def _finish_model(self) -> None:
        team = self._share.team
        for shard in range(self._writer.num_files if team.size > 1 else 0):
            self._writer.sync(shard)
        team.all_gather(None)
        team.leader_first(lambda: self._replace() if team.leads else None)

    def _replace(self) -> None:
        assert self._fit is not None
        paths = [self._writer.path(shard) for shard in range(self._writer.num_files)]
        merged = SafetensorsSource(paths, None)
        try:
            self.crew.new().replace(self._fit.finish(merged, self._writer.folder))
        finally:
            merged.close()
        for shard in range(self._writer.num_files):
            self._writer.sync(shard)  # who hashes it may be on another machine

    def _model_finished(self, _: None) -> None:
        self._fit = None  # nothing will change any more
        for shard in range(len(self._fronts)):
            self._hash_front(shard)

    def _fill(self, step: Step, start: int, stop: int) -> None:
        """The file that holds a step has this unit now."""
        slot = self._plan.shards[step.shard].header.slots[step.spec.name]
        begin, end = start * step.spec.dtype.bits // 8, step.spec.dtype.num_bytes(stop)
        self._fronts[step.shard].add(slot.begin + begin, slot.begin + end)

    def _hash_front(self, shard: int) -> None:
        """Have an output file hashed as far as it is finished, unless a fit will still change it."""
        final = self._fit is None or not self._fit.finishes
        if final and self._share.hashes_output(shard) and self._fronts[shard].take():
            run, after = partial(self._sync_and_hash, shard), partial(self._front_hashed, shard)
            self._schedule.add([Job(run=run, after=after, hashes=True)], first=True)

    def _sync_and_hash(self, shard: int) -> str | None:
        digest = self._fronts[shard].hash()
        if digest is not None:
            self._writer.sync(shard)
        return digest

    def _front_hashed(self, shard: int, digest: str | None) -> None:
        if digest is None:
            self._hash_front(shard)
        else:
            self.record.outputs[self._plan.shards[shard].name] = digest
