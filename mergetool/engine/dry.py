"""What a count over the whole model finds, before a run: weights are read, nothing is written."""

from contextlib import ExitStack, closing
from dataclasses import replace

from mergetool.engine.context import Context
from mergetool.engine.count import CountStage
from mergetool.engine.logs import MemoryLog
from mergetool.engine.partition import Partition
from mergetool.engine.pool import WorkerPool
from mergetool.engine.progress import Progress
from mergetool.engine.schedule import Schedule
from mergetool.engine.sinks import MemorySink
from mergetool.engine.worker import Worker
from mergetool.errors import PlanError
from mergetool.methods.base import Stats
from mergetool.planning import Plan
from mergetool.planning.cost import Costs


def dry_count(plan: Plan, costs: Costs, progress: Progress) -> Stats:
    """The numbers, by what they are called. Raises PlanError where nothing is counted, or cannot be before a run."""
    if (reason := _refusal(plan)) is not None:
        raise PlanError(reason, "--count", "leave it out")
    (stage,) = (stage for stage in plan.stages if stage.name == "count")
    sink = MemorySink(replace(plan, steps=()))
    schedule, pool = Schedule(costs.step_memory, costs.workers), _Forgetful(plan, sink)
    run = Context(plan, sink, MemoryLog(), schedule, pool, Partition(), progress)
    with ExitStack() as opened:
        for source in plan.sources.values():
            opened.enter_context(closing(source))
        opened.enter_context(pool.ready("cpu", None))
        opened.enter_context(schedule.threads())
        CountStage(run, stage).work()
        schedule.close()
        schedule.wait()
    assert run.counted is not None
    return run.counted


class _Forgetful(WorkerPool):
    """Workers that keep nothing of what they make on the way: no merge follows."""

    def new(self) -> Worker:
        return self._new()


def _refusal(plan: Plan) -> str | None:
    names = {stage.name for stage in plan.stages}
    if "count" not in names:
        return "this recipe counts nothing over the whole model"
    if plan.inner or names & {"fit", "gates", "measure"}:
        return "what is counted here is known only once other parts of the run are done"
    if plan.bytes_missing:
        return "it reads weights, and some are not on this machine"
    return None
