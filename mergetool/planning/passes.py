"""What steps need beside their operands, told from their numbers and sizes: passes that come first, and partners."""

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
    decided = [_counting(step, total, bits) if step.operation.counts_model else step for step in counted]
    _check_together([step for step in decided if step.operation.counts_model])
    return decided


def _counting(step: Step, num_elements: int, bits: int) -> Step:
    return replace(step, operation=step.operation.counting(step.spec, num_elements, bits))


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
                f"set check.missing: base, or merge each tensor for itself ({_by_tensor(step)})",
            )
        if step.operation.counts != first.operation.counts:
            raise PlanError(
                f"{name} looks at the whole model at once, but its numbers differ from those of {first.name}",
                step.name,
                f"use the same numbers for all tensors, or merge each tensor for itself ({_by_tensor(step)})",
            )


def _by_tensor(step: Step) -> str:
    """What a recipe says for that."""
    method = step.operation.method
    assert method is not None
    return method.by_tensor


def with_partners(steps: Sequence[Step]) -> list[Step]:
    """Steps that know which others they look at: those that are merged alike, of tensors with rows like theirs."""
    place = {step.name: index for index, step in enumerate(steps)}
    return [
        replace(
            step,
            partners={
                name: place[name]
                for name in step.operation.partners(step.name)
                if name in place and _alike(step, steps[place[name]])
            },
        )
        for step in steps
    ]


def _alike(step: Step, other: Step) -> bool:
    same_rows = len(other.spec.shape) == len(step.spec.shape) and other.spec.shape[1:] == step.spec.shape[1:]
    return same_rows and other.operation == step.operation and (other.base is None) == (step.base is None)
