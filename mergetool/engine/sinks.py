"""Where finished slices go: the slots of files (`SlotWriter`), tensors in memory, or the weights of a live model."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mergetool.planning import Plan
from mergetool.tensors.dtypes import torch_dtype
from mergetool.tensors.source import MemorySource, ModelSource


class Sink(Protocol):
    """Takes slices of output tensors, in any order."""

    @property
    def folder(self) -> Path | None:
        """Where files may be kept beside the tensors."""
        ...

    def write(self, shard: int, name: str, begin: int, data: memoryview) -> None:
        """Put `data` at byte `begin` of tensor `name`."""
        ...

    def sync(self) -> None:
        """Have everything that was written where others can see it."""
        ...

    def source(self) -> ModelSource:
        """What was written, for reading."""
        ...


class MemorySink:
    """New tensors, filled slice by slice."""

    folder: Path | None = None

    def __init__(self, plan: Plan) -> None:
        self.tensors = {
            name: torch.empty(spec.shape, dtype=torch_dtype(spec.dtype)) for name, spec in plan.specs.items()
        }

    def write(self, shard: int, name: str, begin: int, data: memoryview) -> None:
        flat = self.tensors[name].view(-1).view(torch.uint8)
        flat[begin : begin + len(data)] = torch.frombuffer(data, dtype=torch.uint8)

    def sync(self) -> None:
        pass

    def source(self) -> ModelSource:
        return MemorySource(self.tensors, "merged")


class LiveSink:
    """The tensors of a model that stands ready, cast to what it computes in. May keep a digest of what was written."""

    folder: Path | None = None

    def __init__(self, slots: Mapping[str, Tensor], plan: Plan, *, digest: bool) -> None:
        self._flat = {name: tensor.view(-1) for name, tensor in slots.items()}
        self._dtypes = {name: torch_dtype(spec.dtype) for name, spec in plan.specs.items()}
        self._digests: dict[str, hashlib._Hash] | None = {} if digest else None

    def write(self, shard: int, name: str, begin: int, data: memoryview) -> None:
        if self._digests is not None:
            self._digests.setdefault(name, hashlib.sha256()).update(data)
        if len(data) and name in self._flat:
            values = torch.frombuffer(data, dtype=self._dtypes[name])
            start = begin // values.element_size()
            self._flat[name][start : start + len(values)].copy_(values)

    def sync(self) -> None:
        pass

    def source(self) -> ModelSource:
        return MemorySource(self._flat, "live")

    @property
    def digests(self) -> dict[str, str] | None:
        """SHA-256 of every tensor's stored bytes in hex, if they were to be kept."""
        return None if self._digests is None else {name: hasher.hexdigest() for name, hasher in self._digests.items()}
