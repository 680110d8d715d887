"""A network whose weights do not fit in memory: all inputs through one block before the next is read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergetool.errors import PlanError, SourceError
from mergetool.networks.back import Back
from mergetool.networks.chain import IN_ANOTHER_WAY, Chain
from mergetool.networks.kept import KeptInFiles, Unfinished
from mergetool.networks.library import BUILDING, class_of, first_line, library, quiet
from mergetool.networks.modules import in_memory
from mergetool.networks.places import TensorMap, of_one_name, tensors_of
from mergetool.networks.running import WHOLE, RunningNetwork, config_to_run
from mergetool.networks.ways import Parts, Way, WayBack
from mergetool.networks.weights import LentWeights
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import ModelSource, read_whole


@dataclass(frozen=True)
class LayeredNetwork(RunningNetwork):
    """A network of empty parameters, and where their values come from."""

    weights: LentWeights
    unfinished: Unfinished
    """What is done of it, in files."""
    deals: int
    """How many parts of a block gradients are taken of, one after the other: more take less memory and more time."""

    @property
    def device(self) -> torch.device:
        return self.weights.device

    def ways(self, inputs: Sequence[Mapping[str, Tensor]]) -> Iterator[Way]:
        self.weights.are_trained = False
        return self._chain(inputs).ways()

    def ways_back(self, inputs: Sequence[Mapping[str, Tensor]], parts: Parts) -> Iterator[WayBack]:
        return Back(self._chain(inputs), parts, len(inputs), self.deals).ways()

    def _chain(self, inputs: Sequence[Mapping[str, Tensor]]) -> Chain:
        return Chain(self.model, self.weights, self.where, inputs, self.unfinished)

    def keeping(self) -> KeptInFiles:
        return self.unfinished.tensors

    def finishing(self) -> Unfinished:
        return self.unfinished


def load_by_layer(
    source: ModelSource, dtype: torch.dtype, device: torch.device, where: str, place: Path, deals: int
) -> LayeredNetwork:
    """The network of a model's own class, its weights still where they are; what is done of it lies at `place`.

    Raises SourceError, PlanError or OutputError.
    """
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
    weights = LentWeights(source, stored, device)
    return LayeredNetwork(model.eval(), TensorMap(names), shapes, where, weights, Unfinished(place), deals)


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
        raise PlanError(what, where, IN_ANOTHER_WAY)
