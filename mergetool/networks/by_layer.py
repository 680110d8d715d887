"""A network whose weights do not fit in memory: block by block, all inputs through each before the next is read.

What a block makes of each input waits for the next one. The layers around the blocks run before the first and behind
the last; what those before have made is given again when the network runs anew.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergetool.errors import PlanError, SourceError
from mergetool.networks.library import BUILDING, class_of, first_line, library, quiet
from mergetool.networks.modules import in_memory
from mergetool.networks.places import TensorMap, of_one_name, tensors_of
from mergetool.networks.running import WHOLE, RunningNetwork, config_to_run
from mergetool.networks.stages import Stage, blocks_of
from mergetool.networks.weights import Waiting, Weights, own_parameters
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import ModelSource, read_whole

_FIX = "measure it where its weights fit in memory, or deal it out: --device-map auto"


class _EnoughError(Exception):
    """The rest of the network need not run."""


@dataclass(frozen=True)
class LayeredNetwork(RunningNetwork):
    """A network of empty parameters, and where their values come from."""

    weights: Weights
    place: Path
    """Where there is room for files."""

    @property
    def device(self) -> torch.device:
        return self.weights.device

    def stages(self, inputs: Sequence[Mapping[str, Tensor]]) -> Iterator[Stage]:
        return _Chain(self, inputs).stages()

    def keeping(self) -> MutableMapping[str, Tensor]:
        return Waiting(self.place)


def load_by_layer(
    source: ModelSource, dtype: torch.dtype, device: torch.device, where: str, place: Path
) -> LayeredNetwork:
    """The network of a model's own class, its weights still where they are. Raises SourceError or PlanError."""
    assert source.folder is not None
    kind = class_of(read_config(source.folder), where)
    library("measuring", where)
    from accelerate import init_empty_weights

    try:
        with BUILDING, quiet(), init_empty_weights(include_buffers=False):
            model = kind._from_config(config_to_run(source.folder, where), dtype=dtype)
    except (ValueError, OSError, KeyError, RuntimeError, TypeError) as error:
        raise SourceError(f"transformers cannot open it: {first_line(error)}", where, WHOLE) from error
    model.tie_weights()
    shapes = {name: spec.shape for name, spec in source.specs.items()}
    names = _names(model, shapes)
    every = tensors_of(model)
    stored = {id(every[name]): own for name, own in names.items()}
    _check_complete(kind.__name__, model, stored, where)
    _fill_buffers(model, source, names, device)
    return LayeredNetwork(model.eval(), TensorMap(names), shapes, where, Weights(source, stored, device), place)


def _fill_buffers(model: nn.Module, source: ModelSource, names: Mapping[str, str], device: torch.device) -> None:
    for path, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                stored = names.get(f"{path}.{key}".lstrip("."))
                value = buffer if stored is None else read_whole(source, stored).view(buffer.shape).to(buffer.dtype)
                module._buffers[key] = value.to(device)


def _names(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """What the checkpoint calls the tensors of a network, as far as each is one of its."""
    names = of_one_name(model, shapes)
    if set(names.values()) != set(shapes):
        every = tensors_of(model)
        names |= {own: stored for stored, own in in_memory(shapes, model).items() if own in every and own not in names}
    return names


def _check_complete(kind: str, model: nn.Module, stored: Mapping[int, str], where: str) -> None:
    missing = [name for name, value in model.named_parameters() if id(value) not in stored]
    if missing:
        what = f"{missing[0]} of {kind} is no tensor of the model, so it cannot be read layer by layer"
        raise PlanError(what, where, _FIX)


class _Chain:
    """A network that is run block by block."""

    def __init__(self, network: LayeredNetwork, inputs: Sequence[Mapping[str, Tensor]]) -> None:
        self._network, self._model, self._weights = network, network.model, network.weights
        self._inputs = inputs
        self._blocks = blocks_of(network.model)
        inside = {id(module) for block in self._blocks for module in block.modules()}
        outside = [module for module in self._model.modules() if id(module) not in inside]
        self._around = [each for each in outside if any(id(part) in inside for part in each.modules())]
        around = {id(each) for each in self._around}
        self._units = {id(each): each for each in outside if id(each) not in around and own_parameters(each)}
        self._before: list[dict[int, list[Any]]] = [{} for _ in inputs]
        """For each input, what layers before the blocks have made, by layer and call."""
        self._made: list[Any] = [None] * len(inputs)
        """What the last block that ran has made of each input."""
        self._place, self._skipped, self._calls = 0, 0, Counter[int]()
        self._now = -1

    def stages(self) -> Iterator[Stage]:
        """Before the blocks, every block, behind the blocks."""
        if not self._blocks:
            raise self._other_order()
        count = len(self._blocks) + 2
        with self._replaced():
            self._weights.fill(self._around)
            with self._stopping(self._blocks[0], before=True):
                yield Stage(0, count, self._is_before, self._run)
            for number, block in enumerate(self._blocks):
                self._only(self._around, [*block.modules()])
                self._now = number
                own = {id(module) for module in block.modules()}
                with self._stopping(block):
                    yield Stage(number + 1, count, lambda layer, own=own: id(layer) in own, self._run)  # type: ignore[misc]
            self._only(self._around)
            self._now = len(self._blocks)
            yield Stage(
                count - 1, count, lambda layer: id(layer) in self._units and not self._is_before(layer), self._run
            )
            self._weights.drop()

    def _only(self, *modules: Sequence[nn.Module]) -> None:
        self._weights.drop()
        for each in modules:
            self._weights.fill(each)

    def _is_before(self, layer: nn.Module) -> bool:
        begun = any(self._before)
        return id(layer) in self._units and (not begun or id(layer) in self._before[0])

    def _run(self, place: int) -> Any:
        self._place, self._skipped, self._calls = place, 0, Counter()
        answer = None
        with suppress(_EnoughError):
            answer = self._model(**self._inputs[place])
        if self._skipped != max(0, self._now):
            raise self._other_order()
        return answer

    @contextmanager
    def _replaced(self) -> Iterator[None]:
        """While inside, blocks and layers around them run as this chain says."""
        plain = [(unit, self._unit(unit, unit.forward)) for unit in self._units.values()]
        plain += [(block, self._block(number, block.forward)) for number, block in enumerate(self._blocks)]
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
                raise self._other_order()
            self._skipped += 1
            return self._made[self._place]

        return forward

    def _unit(self, unit: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*given: Any, **named: Any) -> Any:
            known = self._before[self._place]
            if self._now < 0:
                self._weights.fill([unit])
                known.setdefault(id(unit), []).append(plain(*given, **named))
                return known[id(unit)][-1]
            if id(unit) in known:
                self._calls[id(unit)] += 1
                if self._calls[id(unit)] <= len(known[id(unit)]):
                    return known[id(unit)][self._calls[id(unit)] - 1]
            if self._now < len(self._blocks) or id(unit) in known:
                raise self._other_order()
            self._weights.fill([unit])
            return plain(*given, **named)

        return forward

    @contextmanager
    def _stopping(self, block: nn.Module, *, before: bool = False) -> Iterator[None]:
        """While inside, the network runs no further than to the end of this block, or to where it begins."""

        def enough(*_: Any) -> None:
            raise _EnoughError

        def made(_: Any, __: Any, output: Any) -> None:
            self._made[self._place] = output
            raise _EnoughError

        hook = block.register_forward_pre_hook(enough) if before else block.register_forward_hook(made)
        try:
            yield
        finally:
            hook.remove()

    def _other_order(self) -> PlanError:
        what = "runs its blocks in another order than one after the other, so it cannot be read layer by layer"
        return PlanError(what, self._network.where, _FIX)
