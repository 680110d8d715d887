"""Weights that come from a source when they are needed, and go again; and tensors that wait in files meanwhile."""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergetool.errors import OutputError
from mergetool.tensors.io import bytes_of, write_error
from mergetool.tensors.source import ModelSource, read_whole
from mergetool.tensors.temporary import folder_of


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


class Waiting(MutableMapping[str, Tensor]):
    """Tensors by name, each in a file of a temporary folder, which goes with them."""

    def __init__(self, place: Path) -> None:
        try:
            self._folder = folder_of(self, place)
        except OSError as error:
            raise _refused(error, place) from error
        self._known: dict[str, tuple[Path, torch.Size, torch.dtype]] = {}

    def __setitem__(self, name: str, value: Tensor) -> None:
        path = self._folder / str(len(self._known))
        try:
            path.write_bytes(bytes_of(value.detach().cpu().contiguous().reshape(-1)))
        except OSError as error:
            raise _refused(error, path) from error
        self._known[name] = path, value.shape, value.dtype

    def __getitem__(self, name: str) -> Tensor:
        path, shape, dtype = self._known[name]
        return torch.from_file(str(path), shared=False, size=shape.numel(), dtype=dtype).view(shape)

    def __delitem__(self, name: str) -> None:
        self._known.pop(name)[0].unlink()

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def _refused(error: OSError, path: Path) -> OutputError:
    told = write_error(error, str(path))
    return OutputError(told.what, told.where, "free some space, or choose another place with --cache DIR")


def own_parameters(module: nn.Module) -> list[Any]:
    """What a module holds itself."""
    return [each for each in module._parameters.values() if each is not None]
