"""Rows of a plan that say the same of many layers, as one: `model.layers.{0..31}.mlp.up_proj.weight`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mergetool.planning.graph import ALIGNED, Plan, Step


@dataclass(frozen=True)
class Pattern:
    """Steps that differ in the numbers within their names, and in depth, only."""

    name: str
    how: str
    steps: tuple[Step, ...]

    def parameters(self) -> dict[str, str]:
        """Every number of the method as text: one value, or the first and the last along depth."""
        along = [step.operation.told for step in sorted(self.steps, key=lambda step: step.depth)]
        return {key: _along([each[key] for each in along]) for key in along[0]}


def patterns(plan: Plan, *, full: bool = False) -> list[Pattern]:
    """The plan's steps, those together that are treated alike; with `full`, each by itself."""
    groups: dict[tuple[Any, ...], list[Step]] = {}
    for step in plan.steps:
        parts = step.name.split(".")
        name = tuple("#" if part.isdecimal() and not full else part for part in parts)
        key = (name, step.spec.shape, step.spec.dtype.name, treatment(step), id(step.operation.method), step.reads)
        groups.setdefault(key, []).append(step)
    return [_pattern(key[3], steps) for key, steps in groups.items()]


def treatment(step: Step) -> str:
    """What is done to a tensor, in a word: not always what the method is called by."""
    told = step.operation.treatment(step.spec)
    return f"align, {told}" if any(operand.view is ALIGNED for operand in step.operands) else told


def _pattern(how: str, steps: Sequence[Step]) -> Pattern:
    columns = zip(*(step.name.split(".") for step in steps), strict=True)
    return Pattern(".".join(_component(column) for column in columns), how, tuple(steps))


def _component(parts: Iterable[str]) -> str:
    """One component of many names: itself, or the numbers that stand there."""
    distinct = list(dict.fromkeys(parts))
    return distinct[0] if len(distinct) == 1 else f"{{{','.join(_ranges(sorted(map(int, distinct))))}}}"


def _ranges(numbers: Sequence[int]) -> Iterator[str]:
    start = numbers[0]
    for number, following in zip(numbers, [*numbers[1:], None], strict=True):
        if following != number + 1:
            yield f"{start}..{number}" if number > start else str(number)
            start = number if following is None else following


def _along(values: Sequence[Any]) -> str:
    """Values along depth; of numbers per model, each by itself where models differ."""
    if isinstance(values[0], str):
        return str(values[0])
    if not isinstance(values[0], tuple):
        return _range(values)
    each = [_range(column) for column in zip(*values, strict=True)]
    return each[0] if len(set(each)) == 1 else f"({', '.join(each)})"


def _range(values: Sequence[Any]) -> str:
    if isinstance(values[0], str):
        return str(values[0])
    first, last = (values[0], values[-1]) if list(values) in (sorted(values), sorted(values)[::-1]) else _span(values)
    return f"{first:.4g}" if min(values) == max(values) else f"{first:.4g} .. {last:.4g}"


def _span(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)
