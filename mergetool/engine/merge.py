"""The stage that makes every output tensor: steps count first if their method asks for it, then units are merged."""

from collections.abc import Iterable
from functools import partial

from mergetool.engine.context import Context
from mergetool.engine.count import Counting
from mergetool.methods.base import StatisticsPass, Stats
from mergetool.methods.group import Note
from mergetool.planning import Step
from mergetool.planning.graph import Stage
from mergetool.planning.sweep import told

Unit = tuple[int, int]
"""(index of a step, first element); within a step, [start, stop)."""


class MergeStage:
    """Which units are to be made, by this process and by all; and what follows from each that is done."""

    def __init__(self, run: Context, stage: Stage) -> None:
        self._run = run
        self._stage = stage
        self._stops = {(step.index, start): stop for step in stage.steps for start, stop in step.pieces()}
        done = {(step, start) for name, step, start in run.log.done.units if name == stage.name}
        self._left = self._stops.keys() - done  # units that no process has written yet
        self._steps = {step.index: step for step in stage.steps}
        self.finished: list[Unit] = []
        """Units that this process has written, in order."""

    def mine(self, step: Step) -> list[tuple[int, int]]:
        """[start, stop) of the units of a step that are left to this process."""
        return [
            (start, stop)
            for start, stop in step.pieces()
            if (step.index, start) in self._left and self._run.mine.has(step.index, start)
        ]

    @property
    def complete(self) -> bool:
        """Whether every unit is written, whoever has written it."""
        return not self._left

    def work(self) -> None:
        """Queue everything that is still to do, in plan order, and wait until all of it is done."""
        self._run.teller.start(self._run.plan.bytes_out, "merging")
        self._run.teller.advance(sum(self._size(unit) for unit in self._stops.keys() - self._left))
        self._run.schedule.record(self._queue_all)
        self._run.begin_beside(self)
        self._run.schedule.wait_for(lambda: self.complete)

    def _queue_all(self) -> None:
        for index, start in self._stops.keys() - self._left:
            self._run.hashes.written(self._steps[index], start, self._stops[index, start])
        for step in self._stage.steps:
            if not self.mine(step):
                continue
            if step.operation.counts is None or step.operation.counts_model:
                stats = self._run.counted if step.operation.counts_model else {}
                assert stats is not None
                self._count_or_queue(step, stats)
            elif step.is_visited and self._run.log.known(self._stage.name, [step]) is None:
                self._queue_visit(step, step.operation.counts)
            else:
                then = partial(self._queue, step, first=True)
                Counting(self._run, self._stage.name, [step], then, everywhere=False).begin()

    def _count_or_queue(self, step: Step, stats: Stats) -> None:
        """Go on with a step of which what is counted over the whole model is known."""
        counts = step.operation.pass_after(stats)
        if counts is None:
            self._queue(step, stats, first=False)
        else:
            then = partial(self._queue, step, first=True)
            Counting(self._run, self._stage.name, [step], then, everywhere=False).begin(counts)

    def _queue(self, step: Step, stats: Stats, *, first: bool) -> None:
        jobs = [
            self._run.job(
                step,
                units[0][0],
                units[-1][1],
                partial(self._perform, step, units, stats),
                partial(self._performed, step, units),
            )
            for units in self._together(step)
        ]
        self._run.schedule.add(jobs, first=first)

    def _together(self, step: Step) -> list[list[Unit]]:
        """[start, stop) of the units that are left to this process, by what a worker makes in one go."""
        made: list[list[Unit]] = []
        for start, stop in self.mine(step):
            if made and made[-1][-1][1] == start and stop - made[-1][0][0] <= self._run.pool.length:
                made[-1].append((start, stop))
            else:
                made.append([(start, stop)])
        return made

    def _queue_visit(self, step: Step, counts: StatisticsPass) -> None:
        """Count over a step that is one unit, and merge it, in one go."""
        ((start, stop),) = step.pieces()
        run, after = partial(self._visit, step, counts), partial(self._visited, step)
        self._run.schedule.add([self._run.job(step, start, stop, run, after)])

    def _visit(self, step: Step, counts: StatisticsPass) -> tuple[Stats, list[Note], list[int]]:
        stats, found, shares = self._run.pool.mine().visit(step, counts)
        notes = told(step, found)
        self._run.log.unit(self._stage.name, step, 0, notes)
        return stats, notes, shares

    def _visited(self, step: Step, result: tuple[Stats, list[Note], list[int]]) -> None:
        stats, notes, shares = result
        ((start, stop),) = step.pieces()
        self._run.log.counted(self._stage.name, [step], stats)
        self._run.record.bytes_read += sum(self._run.plan.bytes_read(step, stop) // share for share in shares)
        self._performed(step, [(start, stop)], notes)

    def _perform(self, step: Step, units: list[Unit], stats: Stats) -> list[Note]:
        notes = told(step, self._run.pool.mine().perform(step, units[0][0], units[-1][1], stats))
        for start, _ in units:
            self._run.log.unit(self._stage.name, step, start, notes)
        return notes

    def _performed(self, step: Step, units: list[Unit], notes: list[Note]) -> None:
        self._run.record.note(step.name, notes)
        for start, stop in units:
            self._run.record.bytes_read += self._run.plan.bytes_read(step, stop - start)
            self.finished.append((step.index, start))
            self._written((step.index, start))
            self._run.hashes.read(step)

    def others_merged(self, units: Iterable[Unit]) -> None:
        """Other processes have written these units."""
        for unit in units:
            self._written(unit)

    def _written(self, unit: Unit) -> None:
        if unit in self._left:
            self._left.discard(unit)
            self._run.teller.advance(self._size(unit))
            self._run.hashes.written(self._steps[unit[0]], unit[1], self._stops[unit])

    def _size(self, unit: Unit) -> int:
        return self._steps[unit[0]].bytes_written(unit[1], self._stops[unit])
