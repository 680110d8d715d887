"""What of a network runs at once: all of it, or one block after the other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Stage:
    """Some layers, and a way to run inputs through them. All inputs run in turn, from the first on."""

    number: int
    count: int
    """Of all stages."""
    has: Callable[[nn.Module], bool]
    """Whether a layer runs now; of those around the blocks it is known when the first input has run."""
    run: Callable[[int], Any]
    """Run one of the inputs; what the network answers in the last stage."""

    @property
    def is_last(self) -> bool:
        return self.number == self.count - 1

    def share(self, rows: int) -> int:
        """How many of so many rows are done by this stage, so that all stages do them once."""
        return rows * (self.number + 1) // self.count - rows * self.number // self.count


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that a network runs one after the other: of all lists of modules the one with most parameters."""
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList)]
    sizes = [sum(value.numel() for value in each.parameters()) for each in lists]
    return list(lists[sizes.index(max(sizes))]) if lists else []
