"""What of a network runs at once: all of it, or one block after the other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Parts = Callable[[int, Any], Sequence[tuple[float, Tensor]]]
"""Of an input, by what the network answers: numbers whose gradients are wanted, and what each of them counts."""


@dataclass(frozen=True)
class Way:
    """Some layers, and a way to run inputs through them. All inputs run in turn, from the first on."""

    number: int
    count: int
    """Of all ways."""
    has: Callable[[nn.Module], bool]
    """Whether a layer runs now; of those around the blocks it is known when the first input has run."""
    run: Callable[[int], Any]
    """Run one of the inputs; what the network answers in the last of all ways."""

    @property
    def is_last(self) -> bool:
        return self.number == self.count - 1

    def share(self, rows: int) -> int:
        """How many of so many rows are done by this way, so that all ways do them once."""
        return _share(rows, self.number, self.count)


@dataclass(frozen=True)
class WayBack:
    """Some parameters, and a way to their gradients. All inputs are asked for in turn, from the first on."""

    number: int
    count: int
    parameters: Mapping[str, nn.Parameter]
    """By their names in memory."""
    gradients: Callable[[int], Iterator[tuple[float, Sequence[Tensor | None]]]]
    """Of one input: for every part of it what that counts, and the gradients of all parameters."""

    def share(self, rows: int) -> int:
        """How many of so many rows are done by this way, so that all ways do them once."""
        return _share(rows, self.number, self.count)


def _share(rows: int, number: int, count: int) -> int:
    return rows * (number + 1) // count - rows * number // count


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that a network runs one after the other: of all lists of modules the one with most parameters."""
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList)]
    sizes = [sum(value.numel() for value in each.parameters()) for each in lists]
    return list(lists[sizes.index(max(sizes))]) if lists else []


def with_more(parts: Sequence[tuple[float, Tensor]]) -> Iterator[tuple[float, Tensor, bool]]:
    """Each part, and whether another one follows."""
    for place, (share, value) in enumerate(parts):
        yield share, value, place + 1 < len(parts)
