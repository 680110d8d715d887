"""Weights that come from a source when they are needed, and go again."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mergetool.tensors.source import ModelSource, read_whole


class LentWeights:
    """The parameters of a network that has none of its own: for each, what a source calls it."""

    def __init__(self, source: ModelSource, names: Mapping[int, str], device: torch.device) -> None:
        """`names`: by the identity of a parameter, which tied layers share."""
        self._source, self._names, self.device = source, names, device
        self.are_trained = False
        """Whether gradients of them are wanted."""
        self._filled: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._there: dict[int, nn.Parameter] = {}

    def fill(self, modules: Iterable[nn.Module]) -> None:
        """Read what these modules hold themselves."""
        for module in modules:
            for key, empty in module._parameters.items():
                if empty is not None and empty.is_meta:
                    module._parameters[key] = self._read(empty)
                    self._filled.append((module, key, empty))

    def drop(self) -> None:
        """Forget what was read."""
        for module, key, empty in self._filled:
            module._parameters[key] = empty
        self._filled, self._there = [], {}

    def _read(self, empty: nn.Parameter) -> nn.Parameter:
        if id(empty) not in self._there:
            stored = read_whole(self._source, self._names[id(empty)]).view(empty.shape)
            value = nn.Parameter(stored.to(self.device, empty.dtype), requires_grad=self.are_trained)
            self._there[id(empty)] = value
        return self._there[id(empty)]


def own_parameters(module: nn.Module) -> list[Any]:
    """What a module holds itself."""
    return [each for each in module._parameters.values() if each is not None]
