"""What the stages of one run share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mergetool.engine.hashing import NoHashes
from mergetool.engine.logs import Log
from mergetool.engine.partition import Partition
from mergetool.engine.pool import WorkerPool
from mergetool.engine.processes import Team
from mergetool.engine.progress import Teller
from mergetool.engine.schedule import Job, Schedule
from mergetool.methods.base import Stats
from mergetool.outputs.record import Record
from mergetool.planning import Plan, Step
from mergetool.planning.cost import step_memory
from mergetool.tensors.source import ModelSource

if TYPE_CHECKING:
    from mergetool.alignment.models import Fitted, Models
    from mergetool.engine.sinks import Sink
    from mergetool.networks.spread import Spread


class Merging(Protocol):
    """The stage that merges, as it looks from beside it."""

    finished: list[tuple[int, int]]
    """(index of a step, first element) of the units that this process has written, in order."""

    def others_merged(self, units: Iterable[tuple[int, int]]) -> None:
        """Other processes have written these units."""
        ...


@dataclass
class Context:
    """One run: its plan, who works, who is told. `after` callbacks of jobs run one at a time and may change it."""

    plan: Plan
    sink: "Sink"
    log: Log
    schedule: Schedule
    pool: WorkerPool
    mine: Partition
    teller: Teller
    record: Record = field(default_factory=Record)
    hashes: NoHashes = field(default_factory=NoHashes)
    counted: Stats | None = None
    """What a count over the whole model has found."""
    begin_beside: "Callable[[Merging], None]" = lambda _: None
    """Begins what goes on beside merging, until the run ends."""
    cache: Path | None = None
    """Where statistics are kept, if not in the user's cache."""
    room: int = 0
    """Bytes that a network may take while something is measured on it."""
    spread: "Spread | None" = None
    """How such a network is dealt out; None: it is on one device."""
    fitted: "tuple[Models, Fitted] | None" = None
    """The whole models, and what a fit has found about them."""

    @property
    def team(self) -> Team:
        return self.mine.team

    def show(self, sources: Mapping[str, ModelSource]) -> None:
        """From now on, operands are read from these."""
        self.plan = self.pool.plan = replace(self.plan, sources=sources)

    @property
    def to_do(self) -> dict[int, int]:
        """How many units of each step this process has to make, by index."""
        done = self.log.done.units
        return {
            step.index: sum(
                ("merge", step.index, start) not in done and self.mine.has(step.index, start)
                for start, _ in step.pieces()
            )
            for step in self.plan.steps
        }

    def is_left(self, steps: Sequence[Step]) -> bool:
        """Whether any unit of these steps was still to be made when the run began, by whoever."""
        done = self.log.done.units
        return any(("merge", step.index, start) not in done for step in steps for start, _ in step.pieces())

    def job(self, step: Step, start: int, stop: int, run: Callable[[], Any], after: Callable[[Any], None]) -> Job:
        """A job over elements [start, stop) of a step's operands."""
        memory = step_memory(self.plan, step, on_device=self.pool.device != "cpu")
        return Job(run, after, memory, partial(self._hint, step, start, stop))

    def _hint(self, step: Step, start: int, stop: int) -> None:
        for operand in step.operands:
            bits = self.plan.spec(operand).dtype.bits
            source = self.plan.sources[operand.source]
            source.will_need(operand.tensor, start * bits // 8, (stop - start) * bits // 8)
