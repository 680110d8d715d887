"""One operation of a traced graph, as the rules see it: axes in the place of tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mergetool.arch.atoms import ONE, Axis, fresh, size_of, unify

Axes = list[Axis]


@dataclass(frozen=True)
class Call:
    """One operation: its arguments by name (a tensor is a list of axes), and the shapes of its results."""

    arguments: dict[str, Any]
    shapes: list[tuple[int, ...]]

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the only result."""
        return self.shapes[0]

    def tensors(self) -> list[Axes]:
        """All operands that are tensors, those in lists included."""
        operands: list[Axes] = []
        for value in self.arguments.values():
            if is_tensor(value):
                operands.append(value)
            elif isinstance(value, list | tuple):
                operands.extend(item for item in value if is_tensor(item))
        return operands


class Value(list[Axis]):
    """The axes of one tensor of the graph."""


def is_tensor(value: Any) -> bool:
    """Whether an argument stands for a tensor, not for a list of numbers."""
    return isinstance(value, Value)


Rule = Callable[[Call], list[Axes]]


def stuck(shape: Sequence[int]) -> Axes:
    """New axes that cannot move."""
    return [fresh(size, pinned=True) for size in shape]


def dim_of(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim % rank if rank else 0


def broadcast(operands: Sequence[Axes], shape: Sequence[int]) -> Axes:
    """The axes of an elementwise operation; axes of size 1 and missing ones impose nothing."""
    result: Axes = []
    for back in range(len(shape), 0, -1):
        aligned = [axes[-back] for axes in operands if len(axes) >= back and size_of(axes[-back]) != 1]
        for first, second in pairwise(aligned):
            unify(first, second)
        result.append(aligned[0] if aligned else ONE)
    return result
