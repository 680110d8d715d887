"""Which statistics passes come before merging: decided once, from numbers and sizes, and put on the steps."""

from collections.abc import Sequence
from dataclasses import replace

from mergetool.errors import PlanError
from mergetool.planning.graph import Step


def with_passes(steps: Sequence[Step], bits: int) -> list[Step]:
    """The steps with the passes that they need; `bits` of the compute dtype.

    Raises PlanError where a pass over the whole model is asked for and the steps do not agree about it.
    """
    counted = [_counting(step, step.spec.num_elements, bits) for step in steps]
    together = [step for step in counted if step.operation.counts_model]
    total = sum(step.spec.num_elements for step in together)
    found = [_counting(step, total, bits) if step.operation.counts_model else step for step in counted]
    _check_together([step for step in found if step.operation.counts_model])
    return found


def _counting(step: Step, num_elements: int, bits: int) -> Step:
    return replace(step, operation=step.operation.counting(num_elements, bits))


def _check_together(steps: Sequence[Step]) -> None:
    """A pass over the whole model has one set of models and one set of numbers."""
    for step in steps[1:]:
        first = steps[0]
        name = step.operation.name
        if step.operation.models != first.operation.models:
            raise PlanError(
                f"{name} looks at the whole model at once, but models {', '.join(step.operation.models)} have this"
                f" tensor, and {', '.join(first.operation.models)} have {first.name}",
                step.name,
                "set check.missing: base, or merge each tensor for itself (scope: tensor)",
            )
        if step.operation.counts != first.operation.counts:
            raise PlanError(
                f"{name} looks at the whole model at once, but its numbers differ from those of {first.name}",
                step.name,
                "use the same numbers for all tensors, or merge each tensor for itself (scope: tensor)",
            )
