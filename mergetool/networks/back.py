"""Gradients of a network whose weights do not fit in memory: all inputs through each block forwards, then backwards.

What goes into a block waits in files until the way back reaches it. Layers around the blocks come last: those behind,
then those before, or together where one is on both sides, as an embedding that is the head. Where even the sums of one
block are too many beside its weights, it is gone through several times, each time for other parameters.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from mergetool.networks.chain import Chain
from mergetool.networks.ways import Parts, Take, WayBack, run_back
from mergetool.networks.weights import own_parameters

Gradients = list[Tensor | None]


class Back:
    """The way back through a chain."""

    def __init__(self, chain: Chain, parts: Parts, inputs: int, deals: int) -> None:
        """`deals`: how many parts of a block are asked for one after the other."""
        self._chain, self._parts, self._inputs, self._deals = chain, parts, range(inputs), deals
        self._into: Sequence[Any] = ()
        """Of each input, what goes into the way that is next."""
        self._behind: list[list[Gradients]] = [[] for _ in self._inputs]
        """For each part of each input, the gradients of what the block that is next on the way back makes."""
        self._before: list[list[Gradients]] = [[] for _ in self._inputs]
        """The same of what the layers before the blocks make, as far as blocks and layers behind them take it."""
        self._shares: list[list[float]] = [[] for _ in self._inputs]

    def ways(self) -> Iterator[WayBack]:
        """Parts of every block, from the last to the first, then the layers around them; all that is not done yet."""
        chain = self._chain
        chain.weights.are_trained = True
        with chain.replaced():
            with torch.no_grad():
                self._forwards()
            self._begin()
            sides = self._sides()
            count = self._deals * len(chain.blocks) + len(sides)
            for number in range(chain.length - 2, 0, -1):
                if not chain.unfinished.is_done(f"back {number}"):
                    yield from self._block_ways(number, count)
            self._into = chain.unfinished.value(f"made {chain.length - 2}")
            for place, side in enumerate(sides, count - len(sides)):
                yield from self._side_way(side, place, count)

    def _forwards(self) -> None:
        for number in self._chain.left():
            if number < self._chain.length - 1:
                with self._chain.at(number):
                    for place in self._inputs:
                        self._chain.run(place)
                self._chain.passed(number)

    def _begin(self) -> None:
        """From what the network answers back to what went into the layers behind the blocks."""
        chain = self._chain
        if chain.unfinished.is_done("answers"):
            self._shares, self._behind, self._before = chain.unfinished.value("back")
            return
        self._into = chain.unfinished.value(f"made {chain.length - 2}")
        with chain.at(chain.length - 1):
            for place in self._inputs:
                self._answer(place)
        chain.unfinished.done("answers", {"back": [self._shares, self._behind, self._before]})

    def _block_ways(self, number: int, count: int) -> Iterator[WayBack]:
        chain, first = self._chain, (self._chain.length - 2 - number) * self._deals
        self._into = chain.unfinished.value(f"made {number - 1}")
        with chain.at(number):
            for deal, own in enumerate(_dealt(_there(chain.model), self._deals), 1):
                last, step = deal == self._deals, f"back {number}: {deal} of {self._deals}"
                if not chain.unfinished.is_done(step):
                    yield WayBack(first + deal - 1, count, own, self._block(own, last=last))
                    chain.unfinished.done(step, {})
                own.clear()  # whoever asked may still hold it while the next block is read
        state = {"back": [self._shares, self._behind, self._before]}
        chain.unfinished.done(f"back {number}", state, [f"made {number - 1}"])

    def _side_way(self, side: "_Side", number: int, count: int) -> Iterator[WayBack]:
        unfinished, weights = self._chain.unfinished, self._chain.weights
        if not unfinished.is_done(f"side {number} of {count}"):
            weights.fill(side.units)
            own = _there(self._chain.model)
            yield WayBack(number, count, own, self._around(own, side))
            own.clear()
            weights.drop()
            unfinished.done(f"side {number} of {count}", {})

    def _sides(self) -> "list[_Side]":
        """The layers behind the blocks, and those before; together where some are both."""
        units, known = self._chain.units, self._chain.before[0]
        before = [unit for key, unit in units.items() if key in known]
        behind = [unit for key, unit in units.items() if key not in known]
        first, last = ({id(value) for unit in side for value in own_parameters(unit)} for side in (before, behind))
        if first & last:
            return [_Side([*before, *behind], before=True, behind=True)]
        sides = [_Side(behind, before=False, behind=True), _Side(before, before=True, behind=False)]
        return [side for side in sides if side.units]

    def _graded(self, place: int, run: Callable[[], Any]) -> tuple[Any, list[Tensor], list[Tensor]]:
        """What a way makes; and what went in, of which gradients are wanted: from the block before, and from before.

        Both are the same tensors at every way, so that gradients can be added up.
        """
        chain, kept = self._chain, self._chain.before[place]
        made, into = _leaves(self._into[place])
        chain.made[place] = made
        chain.before[place], before = _leaves(kept)
        try:
            return run(), into, before
        finally:
            chain.before[place] = kept

    def _answer(self, place: int) -> None:
        def run() -> Any:
            return self._parts(place, self._chain.run(place))

        found, into, before = self._graded(place, run)
        for number, (share, value) in enumerate(found, 1):
            given = torch.autograd.grad(value, [*into, *before], retain_graph=number < len(found), allow_unused=True)
            self._shares[place].append(share)
            self._behind[place].append(list(given[: len(into)]))
            self._before[place].append(list(given[len(into) :]))

    def _block(self, wanted: Mapping[str, nn.Parameter], *, last: bool) -> Callable[[int, Take], None]:
        """`last`: whether the block before is next, so that gradients of what went in are wanted, too."""

        def run(place: int, take: Take) -> None:
            made, into, before = self._graded(place, lambda: self._made(place))
            outputs, shares, others = _numbers(made), self._shares[place], [*into, *before] if last else []
            for part, share in enumerate(shares):
                ends, more = _ends(outputs, self._behind[place][part]), part + 1 < len(shares)
                given = run_back(ends, wanted, others, partial(take, share), more=more)
                if last:
                    self._behind[place][part] = given[: len(into)]
                    self._before[place][part] = _added(self._before[place][part], given[len(into) :])

        return run

    def _made(self, place: int) -> Any:
        self._chain.run(place)
        made, self._chain.made[place] = self._chain.made[place], None  # it holds the weights of this block
        return made

    def _around(self, wanted: Mapping[str, nn.Parameter], side: "_Side") -> Callable[[int, Take], None]:
        def run(place: int, take: Take) -> None:
            found = self._said(place) if side.behind else []
            made = self._made_before(place) if side.before else []
            for part, share in enumerate(self._shares[place]):
                ends = [(found[part][1], None)] if side.behind else list[tuple[Tensor, Tensor | None]]()
                ends += _ends(made, self._before[place][part]) if side.before else []
                run_back(ends, wanted, (), partial(take, share), more=part + 1 < len(self._shares[place]))

        return run

    def _said(self, place: int) -> Sequence[tuple[float, Tensor]]:
        self._chain.made[place] = self._into[place]
        with self._chain.held(self._chain.length - 1):
            return self._parts(place, self._chain.run(place))

    def _made_before(self, place: int) -> list[Tensor]:
        chain, kept = self._chain, self._chain.before[place]
        chain.before[place] = {}
        try:
            with chain.held(0):
                chain.run(place)
            return _numbers(chain.before[place])
        finally:
            chain.before[place] = kept


@dataclass(frozen=True)
class _Side:
    """Layers around the blocks."""

    units: Sequence[nn.Module]
    before: bool
    behind: bool


def _dealt(values: Mapping[str, nn.Parameter], count: int) -> list[dict[str, nn.Parameter]]:
    """Parameters in groups of about the same size."""
    groups: list[dict[str, nn.Parameter]] = [{} for _ in range(count)]
    for name in sorted(values, key=lambda name: -values[name].numel()):
        min(groups, key=lambda group: sum(value.numel() for value in group.values()))[name] = values[name]
    return groups


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
