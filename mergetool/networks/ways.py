"""What of a network runs at once: all of it, or one block after the other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Parts = Callable[[int, Any], Sequence[tuple[float, Tensor]]]
"""Of an input, by what the network answers: numbers whose gradients are wanted, and what each of them counts."""
Take = Callable[[float, str, Tensor], None]
"""Hears what a part counts, and the gradient of the parameter of this name."""


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
    run: Callable[[int, Take], None]
    """Run one of the inputs there and back. Of every part of it, each gradient is told as soon as there is one."""

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


def run_back(
    ends: Sequence[tuple[Tensor, Tensor | None]],
    parameters: Mapping[str, nn.Parameter],
    others: Sequence[Tensor],
    take: Callable[[str, Tensor], None],
    *,
    more: bool,
) -> list[Tensor | None]:
    """Gradients of `others`; those of parameters are told and forgotten, so that there are never two.

    `ends`: outputs with their gradients (None: a number that stands for itself). `more`: whether it will be run again.
    """
    if not (ends and (parameters or others)):
        return [None] * len(others)
    hooks = [each.register_hook(_telling(name, take)) for name, each in parameters.items()]  # type: ignore[no-untyped-call]
    outputs, begun = zip(*ends, strict=True)
    wanted = [*parameters.values(), *others]
    try:
        found = torch.autograd.grad(outputs, wanted, grad_outputs=begun, retain_graph=more, allow_unused=True)
    finally:
        for each in hooks:
            each.remove()
    return list(found[len(parameters) :])


def _telling(name: str, take: Callable[[str, Tensor], None]) -> Callable[[Tensor], Tensor | None]:
    def hook(gradient: Tensor) -> Tensor | None:
        take(name, gradient)
        return None if gradient.is_sparse else gradient.new_zeros(()).expand_as(gradient)  # one number in its place

    return hook
