"""The numbers of a plan: what a method's settings come to for each tensor, and the same plan with other settings.

A search tries hundreds of settings of one method on the same models. Names, operands, shapes and files stay as they
are; so the first plan is kept, and only the numbers on its steps are made anew.
"""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from mergetool.checkpoints.experts import fused_name
from mergetool.errors import PlanError
from mergetool.methods.base import Method, Params, TensorMethod
from mergetool.methods.then import After
from mergetool.methods.then.followed import Followed
from mergetool.methods.values import settled
from mergetool.planning.graph import Plan, Step
from mergetool.planning.operations import Merge
from mergetool.planning.passes import with_partners, with_passes
from mergetool.recipe.schema import Override, Recipe


def numbers_of(method: TensorMethod, depth: float, models: Sequence[str], name: str) -> Params:
    """A method's numbers for one tensor. Raises PlanError where they cannot work together."""
    params = method.params(depth, models)
    if problem := method.problem(params):
        raise PlanError(problem, f"{method.called}: {name}", "change the numbers for this tensor")
    return params


def overridden(method: Method, override: Override, depth: float | None = None) -> TensorMethod:
    """What merges tensors that an override fits; with `depth`, its own gradients are taken there."""
    settings = override.settings()
    if depth is not None:
        settings = {key: settled(value, depth) for key, value in settings.items()}
    return method.model_copy(update=settings).kernel()


class Kernels:
    """What merges a tensor: a method, or one with the steps that follow it there. Alike ones are one object."""

    def __init__(self, steps: Sequence[After]) -> None:
        self.steps = steps
        self.matched: set[str | None] = {None}
        """Globs of steps that fit some tensor."""
        self._made: dict[tuple[int, tuple[After, ...]], TensorMethod] = {}

    def of(self, method: TensorMethod, name: str) -> TensorMethod:
        """The method with all steps that are meant for a tensor."""
        steps = tuple(step for step in self.steps if step.match is None or _matches(name, step.match))
        if not steps:
            return method
        self.matched |= {step.match for step in steps}
        key = id(method), steps
        if key not in self._made:
            self._made[key] = Followed(inner=method, steps=steps)
        return self._made[key]


def fits(override: Override, name: str) -> bool:
    """Whether an override is meant for a tensor, under its name or under that which it has among fused experts."""
    return _matches(name, override.match)


def _matches(name: str, glob: str) -> bool:
    return fnmatchcase(name, glob) or fnmatchcase(fused_name(name), glob)


def keeps_operands(plan: Plan, recipe: Recipe) -> bool:
    """Whether a recipe that differs in `merge` only copies and merges the same tensors as a plan does."""
    before, after = ([(each.match, each.use) for each in r.overrides] for r in (plan.recipe, recipe))
    return before == after


def with_numbers(plan: Plan, recipe: Recipe) -> Plan:
    """The plan of a recipe that keeps the operands of another one's. Raises PlanError."""
    special = [(override, overridden(recipe.method, override)) for override in recipe.overrides]
    usual, kernels = recipe.method.kernel(), Kernels(recipe.then)

    def numbered(step: Step) -> Step:
        if not isinstance(step.operation, Merge):
            return step
        method = next((method for override, method in special if fits(override, step.key)), usual)
        method, models = kernels.of(method, step.key), step.operation.models
        if method.statistic and not step.statistics:
            method = method.unmeasured()
        return replace(step, operation=Merge(method, numbers_of(method, step.depth, models, step.name), models))

    steps = with_passes([numbered(step) for step in plan.steps], plan.compute_bits)
    return replace(plan, recipe=recipe, steps=tuple(with_partners(steps)))
