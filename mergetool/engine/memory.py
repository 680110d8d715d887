"""Merges that stay in memory: the same stages, with slots in tensors and one thread, that of the caller."""

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from mergetool.engine.context import Context
from mergetool.engine.logs import Log, MemoryLog
from mergetool.engine.partition import Partition
from mergetool.engine.pool import WorkerPool
from mergetool.engine.progress import Silent
from mergetool.engine.schedule import Schedule
from mergetool.engine.sinks import MemorySink, Sink
from mergetool.engine.stages import run_stages
from mergetool.engine.trust import check_trust
from mergetool.errors import RecipeError
from mergetool.planning import Plan, make_plan
from mergetool.recipe.schema import Recipe
from mergetool.tensors.source import MemorySource

NONE: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({})


def merge_in_memory(
    recipe: Recipe,
    tensors: Mapping[str, Mapping[str, Tensor]],
    statistics: Mapping[str, Mapping[str, Tensor]] = NONE,
    *,
    trust_code: bool = False,
) -> dict[str, Tensor]:
    """Merge state dicts by name (the base under "base"), with what was measured on them.

    Stages, methods and checks are those of a run.
    """
    check_trust(recipe, trusted=trust_code)
    _check_result(recipe)
    sources = {name: MemorySource(state, name) for name, state in tensors.items()}
    measured = {name: MemorySource(state, f"statistic of {name}") for name, state in statistics.items()}
    plan = make_plan(recipe, sources=sources, whole=True, statistics=measured)
    sink = MemorySink(plan)
    merge_into(plan, sink)
    return sink.tensors


def merge_into(plan: Plan, sink: Sink, device: str = "cpu", log: Log | None = None) -> None:
    """Do all stages of a plan here and now. A `log` that is kept spares what was counted for the same models."""
    pool = WorkerPool(plan, sink)
    with pool.ready(device, None):
        run_stages(here(plan, sink, pool, log))


def here(plan: Plan, sink: Sink, pool: WorkerPool, log: Log | None = None) -> Context:
    """What stages need to run in the thread that asks, with nobody beside it."""
    return Context(plan, sink, log or MemoryLog(), Schedule(), pool, Partition(), Silent())


def _check_result(recipe: Recipe) -> None:
    """Refuse methods whose result is no state dict, or that need more than weights."""
    name = recipe.method.method_name()
    if recipe.method.searches:
        what = f"{name} judges candidates by running them, and state dicts have no config and no tokenizer"
        fix = "save the models as folders and run a recipe: mergetool.run({...}, output=FOLDER)"
        raise RecipeError(what, "merge_state_dicts", fix)
    if recipe.method.result == "bundle":
        what = f"{name} makes a folder that serves every model's task, not one state dict"
        fix = "save the models and run a recipe: mergetool.run({...}, output=FOLDER); or take tsv-merge for one model"
        raise RecipeError(what, "merge_state_dicts", fix)
