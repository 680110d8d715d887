"""Gradients of a network whose weights do not fit in memory: all inputs through each block forwards, then backwards.

What goes into a block waits in files until the way back reaches it. Layers around the blocks come last, together: one
of them may be used on both sides, as an embedding that is the head.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from mergetool.networks.chain import Chain
from mergetool.networks.ways import Parts, Take, WayBack, run_back
from mergetool.networks.weights import Waiting

Gradients = list[Tensor | None]


class Back:
    """The way back through a chain."""

    def __init__(self, chain: Chain, parts: Parts, inputs: int, place: Path) -> None:
        self._chain, self._parts, self._inputs = chain, parts, range(inputs)
        self._waiting = _Nested(place)
        self._behind: list[list[Gradients]] = [[] for _ in self._inputs]
        """For each part of each input, the gradients of what the block that is next on the way back makes."""
        self._before: list[list[Gradients]] = [[] for _ in self._inputs]
        """The same of what the layers before the blocks make, as far as blocks and layers behind them take it."""
        self._shares: list[list[float]] = [[] for _ in self._inputs]

    def ways(self) -> Iterator[WayBack]:
        """Every block, from the last to the first, then the layers around them."""
        chain = self._chain
        chain.weights.are_trained = True
        with chain.replaced():
            with torch.no_grad():
                self._forwards()
            with chain.at(chain.length - 1):
                for place in self._inputs:
                    self._begin(place)
            for number in range(chain.length - 2, 0, -1):
                with chain.at(number):
                    found = _there(chain.model)
                    yield WayBack(chain.length - 2 - number, chain.length - 1, found, self._block(number, found))
                    found.clear()  # whoever asked may still hold it while the next block is read
            chain.weights.fill(chain.units.values())
            found = _there(chain.model)
            yield WayBack(chain.length - 2, chain.length - 1, found, self._around(found))
            found.clear()
            chain.weights.drop()

    def _forwards(self) -> None:
        for number in range(self._chain.length - 1):
            with self._chain.at(number):
                for place in self._inputs:
                    if number:
                        self._waiting[number, place] = self._chain.made[place]
                    self._chain.run(place)
        for place in self._inputs:
            self._waiting[self._chain.length - 1, place] = self._chain.made[place]

    def _graded(self, number: int, place: int, run: Callable[[], Any]) -> tuple[Any, list[Tensor], list[Tensor]]:
        """What a way makes; and what went in, of which gradients are wanted: from the block before, and from before.

        Both are the same tensors at every way, so that gradients can be added up.
        """
        chain, kept = self._chain, self._chain.before[place]
        made, into = _leaves(self._waiting[number, place])
        chain.made[place] = made
        chain.before[place], before = _leaves(kept)
        try:
            return run(), into, before
        finally:
            chain.before[place] = kept

    def _begin(self, place: int) -> None:
        """From what the network answers back to what went into the layers behind the blocks."""

        def run() -> Any:
            return self._parts(place, self._chain.run(place))

        found, into, before = self._graded(self._chain.length - 1, place, run)
        for number, (share, value) in enumerate(found, 1):
            given = torch.autograd.grad(value, [*into, *before], retain_graph=number < len(found), allow_unused=True)
            self._shares[place].append(share)
            self._behind[place].append(list(given[: len(into)]))
            self._before[place].append(list(given[len(into) :]))

    def _block(self, number: int, wanted: Mapping[str, nn.Parameter]) -> Callable[[int, Take], None]:
        def run(place: int, take: Take) -> None:
            made, into, before = self._graded(number, place, lambda: self._made(place))
            outputs, shares = _numbers(made), self._shares[place]
            for part, share in enumerate(shares):
                ends, more = _ends(outputs, self._behind[place][part]), part + 1 < len(shares)
                given = run_back(ends, wanted, [*into, *before], partial(take, share), more=more)
                self._behind[place][part] = given[: len(into)]
                self._before[place][part] = _added(self._before[place][part], given[len(into) :])

        return run

    def _made(self, place: int) -> Any:
        self._chain.run(place)
        return self._chain.made[place]

    def _around(self, wanted: Mapping[str, nn.Parameter]) -> Callable[[int, Take], None]:
        def run(place: int, take: Take) -> None:
            chain, kept = self._chain, self._chain.before[place]
            chain.made[place] = self._waiting[chain.length - 1, place]
            with chain.held(chain.length - 1):
                found = self._parts(place, chain.run(place))
            chain.before[place] = {}
            with chain.held(0):
                chain.run(place)
            made = _numbers(chain.before[place])
            chain.before[place] = kept
            for part, (share, value) in enumerate(found):
                ends, more = [(value, None), *_ends(made, self._before[place][part])], part + 1 < len(found)
                run_back(ends, wanted, (), partial(take, share), more=more)

        return run


class _Nested:
    """Tensors within tuples and the like, which wait in files."""

    def __init__(self, place: Path) -> None:
        self._tensors, self._forms = Waiting(place), dict[tuple[int, int], tuple[list[Any], Any]]()

    def __setitem__(self, key: tuple[int, int], value: Any) -> None:
        leaves, form = tree_flatten(value)
        self._forms[key] = [None if isinstance(each, Tensor) else each for each in leaves], form
        for index, each in enumerate(leaves):
            if isinstance(each, Tensor):
                self._tensors[f"{key} {index}"] = each

    def __getitem__(self, key: tuple[int, int]) -> Any:
        if key not in self._forms:
            return None
        leaves, form = self._forms[key]
        held = [self._tensors.get(f"{key} {index}", each) for index, each in enumerate(leaves)]
        return tree_unflatten(held, form)


def _there(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are there now."""
    return {name: each for name, each in model.named_parameters() if not each.is_meta}


def _leaves(value: Any) -> tuple[Any, list[Tensor]]:
    """The same values, and those among them that have a gradient, as tensors of which it can be asked for."""
    made = tree_map(lambda each: each.detach().clone().requires_grad_() if _is_number(each) else each, value)
    return made, [each for each in tree_flatten(made)[0] if _is_number(each)]


def _numbers(value: Any) -> list[Tensor]:
    return [each for each in tree_flatten(value)[0] if _is_number(each)]


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _ends(outputs: Sequence[Tensor], given: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor | None]]:
    """Outputs that have gradients, with these as far as they are known; a number may stand for itself (None)."""
    return [
        (each, own)
        for each, own in zip(outputs, given, strict=True)
        if each.requires_grad and (own is not None or each.dim() == 0)
    ]


def _added(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> Gradients:
    return [b if a is None else a if b is None else a + b for a, b in zip(one, other, strict=True)]
