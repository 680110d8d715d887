"""Merging state dicts that are already in memory: the same worker, with slots in tensors instead of files."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from mergetool.engine.devices import one_thread
from mergetool.engine.fit import fit
from mergetool.engine.processes import Team
from mergetool.engine.trust import check_trust
from mergetool.engine.worker import Sink, Worker, combined
from mergetool.errors import RecipeError
from mergetool.methods.base import BundleMethod, SearchMethod
from mergetool.planning import Plan, Step, make_plan
from mergetool.planning.graph import UNIT_ELEMENTS
from mergetool.recipe.schema import Recipe
from mergetool.tensors.dtypes import torch_dtype
from mergetool.tensors.source import MemorySource


class MemorySink(Sink):
    """Result tensors, filled slice by slice."""

    def __init__(self, plan: Plan) -> None:
        self.tensors = {
            step.spec.name: torch.empty(step.spec.shape, dtype=torch_dtype(step.spec.dtype)) for step in plan.steps
        }

    def write(self, shard: int, name: str, begin: int, data: memoryview) -> None:
        flat = self.tensors[name].view(-1).view(torch.uint8)
        flat[begin : begin + len(data)] = torch.frombuffer(data, dtype=torch.uint8)


def merge_in_memory(
    recipe: Recipe, tensors: Mapping[str, Mapping[str, Tensor]], *, trust_code: bool = False
) -> dict[str, Tensor]:
    """Merge state dicts by name (the base under "base"). Surveys, methods and checks are those of a run."""
    check_trust(recipe, trusted=trust_code)
    _check_result(recipe)
    sources = {name: MemorySource(state, name) for name, state in tensors.items()}
    plan = make_plan(recipe, sources=sources, whole=True)
    fitted = fit(plan, None, lambda _: None, Team())
    plan = fitted.plan
    sink = MemorySink(plan)
    worker = Worker(plan, sink, torch.device("cpu"))
    merge_all(plan, worker)
    if fitted.finishes:
        with one_thread():
            worker.replace(fitted.finish(MemorySource(sink.tensors, "merged"), None))
    return sink.tensors


def _check_result(recipe: Recipe) -> None:
    """Refuse methods whose result is no state dict, or that need more than weights."""
    name = recipe.method.method_name()
    if isinstance(recipe.method, SearchMethod):
        what = f"{name} judges candidates by running them, and state dicts have no config and no tokenizer"
        fix = "save the models as folders and run a recipe: mergetool.run({...}, output=FOLDER)"
        raise RecipeError(what, "merge_state_dicts", fix)
    if isinstance(recipe.method, BundleMethod):
        what = f"{name} makes a folder that serves every model's task, not one state dict"
        fix = "save the models and run a recipe: mergetool.run({...}, output=FOLDER); or take tsv-merge for one model"
        raise RecipeError(what, "merge_state_dicts", fix)


Known = dict[str, Mapping[str, tuple[float, ...]]]
"""What surveys found, by all that it depends on but the weights."""


def merge_all(plan: Plan, worker: Worker, known: Known | None = None) -> None:
    """Count and merge every step, in plan order. With `known`, what surveys of the same weights found is kept."""
    with one_thread():
        shared = _surveyed(plan, worker, [step for step in plan.steps if step.surveyed_together], known)
        for step in plan.steps:
            stats = shared if step.surveyed_together else _surveyed(plan, worker, [step], known)
            worker.merge(step, 0, step.spec.num_elements, stats)


def _surveyed(plan: Plan, worker: Worker, steps: list[Step], known: Known | None) -> Mapping[str, tuple[float, ...]]:
    """What the surveys of these steps find, or have found before."""
    if known is None or not steps or steps[0].method is None:
        return _survey(plan, worker, steps)
    method, numbers = steps[0].method, vars(steps[0].params)
    chosen = numbers if method.surveyed is None else {key: numbers[key] for key in method.surveyed}
    settings = method.model_dump(exclude=set(method.schedulables()))
    key = json.dumps([[step.spec.name for step in steps], steps[0].sources, settings, chosen], default=str)
    if key not in known:
        known[key] = _survey(plan, worker, steps)
    return known[key]


def _survey(plan: Plan, worker: Worker, steps: list[Step]) -> Mapping[str, tuple[float, ...]]:
    """Run all surveys that these steps share, one after the other, and return the statistics."""
    if not steps or steps[0].method is None:
        return {}
    total = sum(step.spec.num_elements for step in steps)
    survey = steps[0].method.survey(steps[0].params, total, plan.compute_bits)
    while survey is not None:
        counts = [worker.survey(step, *piece, survey) for step in steps for piece in step.pieces(UNIT_ELEMENTS)]
        conclusion = survey.conclude(combined(survey, counts))
        if isinstance(conclusion, Mapping):
            return conclusion
        survey = conclusion
    return {}
