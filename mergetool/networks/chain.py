"""A network that runs block by block, with no more of its weights than the block that runs.

What a block makes of each input waits for the next one. The layers around the blocks run before the first and behind
the last; what those before have made is given again when the network runs anew.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from mergetool.errors import PlanError
from mergetool.networks.kept import Unfinished
from mergetool.networks.ways import Way, blocks_of
from mergetool.networks.weights import LentWeights, own_parameters

IN_ANOTHER_WAY = "let it have the memory that it takes whole (--memory SIZE), or deal it out: --device-map auto"
"""What can be done where a network cannot be read layer by layer."""


class _EnoughError(Exception):
    """The rest of the network need not run."""


class Chain:
    """A network that is run block by block."""

    def __init__(
        self,
        model: nn.Module,
        weights: LentWeights,
        where: str,
        inputs: Sequence[Mapping[str, Tensor]],
        unfinished: Unfinished,
    ) -> None:
        self.model, self.weights, self._where, self._inputs = model, weights, where, inputs
        self.unfinished = unfinished
        self.blocks = blocks_of(model)
        if not self.blocks:
            raise self.other_order()
        inside = {id(module) for block in self.blocks for module in block.modules()}
        outside = [module for module in self.model.modules() if id(module) not in inside]
        self._around = [each for each in outside if any(id(part) in inside for part in each.modules())]
        around = {id(each) for each in self._around}
        self.units = {id(each): each for each in outside if id(each) not in around and own_parameters(each)}
        self.before: list[dict[int, list[Any]]] = [{} for _ in inputs]
        """For each input, what layers before the blocks have made, by layer and call."""
        self.made: list[Any] = [None] * len(inputs)
        """What the last block that ran has made of each input."""
        self._place, self._skipped, self._calls = 0, 0, Counter[int]()
        self._now = -1

    @property
    def length(self) -> int:
        """How many ways there are: before the blocks, every block, behind the blocks."""
        return len(self.blocks) + 2

    def ways(self) -> Iterator[Way]:
        """All ways that are not done yet, each with its weights."""
        with self.replaced():
            for number in self.left():
                with self.at(number):
                    yield Way(number, self.length, self._is_in(number), self.run)
                self.passed(number, over=[f"made {number - 1}"])

    def left(self) -> Iterator[int]:
        """The ways that are not done yet, up to the last."""
        done = [number for number in range(self.length - 1) if self.unfinished.is_done(f"way {number}")]
        if done:
            units = list(self.units)
            kept = self.unfinished.value("before")
            self.before = [{units[place]: values for place, values in each} for each in kept]
            self.made = self.unfinished.value(f"made {len(done) - 1}")
        yield from range(len(done), self.length)

    def passed(self, number: int, over: Sequence[str] = ()) -> None:
        """A way is done; what it has made is kept for the next ones, instead of values that are of no use now."""
        values: dict[str, Any] = {f"made {number}": self.made}
        if number == 0:
            places = {unit: place for place, unit in enumerate(self.units)}
            values["before"] = [[(places[unit], made) for unit, made in each.items()] for each in self.before]
        if number < self.length - 1:
            self.unfinished.done(f"way {number}", values, over)

    def _is_in(self, number: int) -> Callable[[nn.Module], bool]:
        if number == 0:
            return self._is_before
        if number == self.length - 1:
            return lambda layer: id(layer) in self.units and not self._is_before(layer)
        own = {id(module) for module in self.blocks[number - 1].modules()}
        return lambda layer: id(layer) in own

    @contextmanager
    def at(self, number: int) -> Iterator[None]:
        """While inside, the network runs up to the end of a way, of which nothing but the weights of that is read."""
        self.weights.fill(self._around)
        if 0 < number < self.length - 1:
            self.weights.fill(self.blocks[number - 1].modules())
        try:
            with self.held(number):
                yield
        finally:
            self.weights.drop()

    @contextmanager
    def held(self, number: int) -> Iterator[None]:
        """While inside, the network runs up to the end of a way."""
        self._now, hook = number - 1, None
        if number == 0:
            hook = self.blocks[0].register_forward_pre_hook(self._stop)
        elif number < self.length - 1:
            hook = self.blocks[number - 1].register_forward_hook(self._keep)
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()

    def _keep(self, _: Any, __: Any, output: Any) -> None:
        self.made[self._place] = output
        raise _EnoughError

    @staticmethod
    def _stop(*_: Any) -> None:
        raise _EnoughError

    def _is_before(self, layer: nn.Module) -> bool:
        begun = any(self.before)
        return id(layer) in self.units and (not begun or id(layer) in self.before[0])

    def run(self, place: int) -> Any:
        """Run one input; what the network answers, if it comes to that."""
        self._place, self._skipped, self._calls = place, 0, Counter()
        answer = None
        with suppress(_EnoughError):
            answer = self.model(**self._inputs[place])
        if self._skipped != max(0, self._now):
            raise self.other_order()
        return answer

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """While inside, blocks and layers around them run as this chain says."""
        plain = [(unit, self._unit(unit, unit.forward)) for unit in self.units.values()]
        plain += [(block, self._block(number, block.forward)) for number, block in enumerate(self.blocks)]
        for module, forward in plain:
            module.forward = forward
        try:
            yield
        finally:
            for module, _ in plain:
                del module.forward

    def _block(self, number: int, plain: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*given: Any, **named: Any) -> Any:
            if number >= self._now:
                return plain(*given, **named)
            if number != self._skipped:
                raise self.other_order()
            self._skipped += 1
            return self.made[self._place]

        return forward

    def _unit(self, unit: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*given: Any, **named: Any) -> Any:
            known = self.before[self._place]
            if self._now < 0:
                self.weights.fill([unit])
                known.setdefault(id(unit), []).append(plain(*given, **named))
                return known[id(unit)][-1]
            if id(unit) in known:
                self._calls[id(unit)] += 1
                if self._calls[id(unit)] <= len(known[id(unit)]):
                    return known[id(unit)][self._calls[id(unit)] - 1]
            if self._now < len(self.blocks) or id(unit) in known:
                raise self.other_order()
            self.weights.fill([unit])
            return plain(*given, **named)

        return forward

    def other_order(self) -> PlanError:
        """The error for a network that is none of this kind."""
        what = "runs its blocks in another order than one after the other, so it cannot be read layer by layer"
        return PlanError(what, self._where, IN_ANOTHER_WAY)
