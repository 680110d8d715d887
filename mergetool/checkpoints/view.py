"""A model under other names: every name of the view is a tensor of the model behind it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from mergetool.tensors.dtypes import DType
from mergetool.tensors.factors import Halves, KeptChange
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.source import FileStamp, ModelSource


class RenamedModel(ModelSource):
    """`model` under the names that are the keys of `stored`; several of them may be one tensor."""

    def __init__(self, model: ModelSource, stored: Mapping[str, str]) -> None:
        self.model = model
        self.stored = stored
        self.folder, self.stem, self.remarks = model.folder, model.stem, model.remarks
        self.specs: Mapping[str, TensorSpec] = {
            name: replace(model.specs[own], name=name) for name, own in stored.items()
        }

    @property
    def described(self) -> Mapping[str, TensorSpec]:
        known = self.model.described
        return {name: replace(known[own], name=name) for name, own in self.stored.items() if own in known}

    @property
    def tokenizer_folder(self) -> Path | None:
        return self.model.tokenizer_folder

    @property
    def files(self) -> tuple[FileStamp, ...]:
        return self.model.files

    def position(self, name: str) -> tuple[int, int]:
        return self.model.position(self.stored[name])

    def read_bytes(self, name: str, begin: int, buffer: memoryview) -> None:
        self.model.read_bytes(self.stored[name], begin, buffer)

    def stored_as(self, name: str) -> DType:
        return self.model.stored_as(self.stored[name])

    @cached_property
    def origin(self) -> ModelSource:
        origin = self.model.origin
        if origin is self.model:
            return self
        return RenamedModel(origin, {name: own for name, own in self.stored.items() if own in origin.specs})

    def num_directions(self, name: str) -> int | None:
        return self.model.num_directions(self.stored[name])

    def factors(self, name: str) -> Halves | None:
        return self.model.factors(self.stored[name])

    def kept(self, name: str) -> KeptChange | None:
        return self.model.kept(self.stored[name])

    def scale(self, name: str) -> float:
        return self.model.scale(self.stored[name])

    def will_need(self, name: str, begin: int, length: int) -> None:
        self.model.will_need(self.stored[name], begin, length)

    def close(self) -> None:
        self.model.close()
