"""Statistics passes: read, count, conclude, until nothing more is to be counted.

A pass over one tensor comes just before that tensor is merged; one over the whole model is a stage of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from mergetool.engine.context import Context
from mergetool.engine.schedule import Job
from mergetool.methods.base import StatisticsPass, Stats
from mergetool.outputs.record import joined_counts
from mergetool.planning import Step
from mergetool.planning.graph import Stage

if TYPE_CHECKING:
    from torch import Tensor


class Counting:
    """All passes over some steps that share them, one after the other; `then` hears what they found."""

    def __init__(
        self, run: Context, stage: str, steps: Sequence[Step], then: Callable[[Stats], None], *, everywhere: bool
    ) -> None:
        """`everywhere`: whether several processes count, each its own part."""
        self._run = run
        self._stage = stage
        self._steps = steps
        self._then = then
        self._everywhere = everywhere
        self._parts: list[Tensor | None] = []
        """Counts of each piece, in plan order; whole numbers are added to the first at once."""
        self._waiting = 0

    def begin(self, counts: StatisticsPass | None = None) -> None:
        """Queue the first pass, that of the steps if not another; nothing where all is known from before."""
        counts = counts or self._steps[0].operation.counts
        assert counts is not None
        stats = self._run.log.known(self._stage, self._steps)
        if stats is None:
            self._queue(counts, first=False)
        else:
            self._then(stats)

    def _queue(self, counts: StatisticsPass, *, first: bool) -> None:
        pieces = [(step, *piece) for step in self._steps for piece in step.pieces()]
        mine = [(place, piece) for place, piece in enumerate(pieces) if self._run.mine.has(piece[0].index, piece[1])]
        self._waiting = len(mine)
        self._parts = [None] * len(pieces)
        jobs = [
            self._run.job(
                step, start, stop, partial(self._count, step, start, stop, counts), partial(self._add, counts, place)
            )
            for place, (step, start, stop) in mine
        ]
        self._run.schedule.add(jobs, first=first)
        if not mine:
            self._queue_conclusion(counts)

    def _count(self, step: Step, start: int, stop: int, counts: StatisticsPass) -> "tuple[int, Tensor]":
        size = self._run.plan.bytes_read(step, stop - start) // counts.one_in
        return size, self._run.pool.mine().count(step, start, stop, counts)

    def _add(self, counts: StatisticsPass, place: int, result: "tuple[int, Tensor]") -> None:
        size, part = result
        self._run.record.bytes_read += size
        if not part.is_floating_point() and not counts.joined:  # exact in any order: keep one, not thousands
            before = self._parts[0]
            place, part = 0, part if before is None else before.add_(part)
        self._parts[place] = part
        self._waiting -= 1
        if self._waiting == 0:
            self._queue_conclusion(counts)

    def _queue_conclusion(self, counts: StatisticsPass) -> None:
        self._run.schedule.add([Job(run=partial(self._conclude, counts), after=self._concluded)], first=True)

    def _conclude(self, counts: StatisticsPass) -> StatisticsPass | Stats:
        """What the counts come to: those of all processes, where all of them count."""
        from mergetool.engine.worker import combined

        parts = joined_counts(self._run.team.all_gather(self._parts)) if self._everywhere else self._parts
        return counts.conclude(combined(counts, (part for part in parts if part is not None)))

    def _concluded(self, conclusion: StatisticsPass | Stats) -> None:
        if isinstance(conclusion, Mapping):
            self._run.log.counted(self._stage, self._steps, conclusion)
            self._then(conclusion)
        else:
            self._queue(conclusion, first=True)


class CountStage:
    """The stage that counts over the whole model."""

    def __init__(self, run: Context, stage: Stage) -> None:
        self._run = run
        self._stage = stage

    def work(self) -> None:
        if not self._run.is_left(self._stage.steps):
            return  # every unit that would need the counts is there already
        counting = Counting(self._run, self._stage.name, self._stage.steps, self._found, everywhere=True)
        self._run.schedule.record(counting.begin)
        self._run.schedule.wait_for(lambda: self._run.counted is not None)

    def _found(self, stats: Stats) -> None:
        self._run.counted = stats
