"""A model with an adapter, seen as a model: changed tensors are made slice by slice when they are read.

They are made in float32 whatever the storage dtypes, and handed on in float32, so that the adapter's small changes are
not rounded away before merging.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from mergetool.checkpoints.adapters.arithmetic import Arithmetic
from mergetool.checkpoints.adapters.changes import Added, Change, LowRank
from mergetool.checkpoints.adapters.files import changes_nothing, open_weights
from mergetool.checkpoints.adapters.matching import Matching
from mergetool.checkpoints.adapters.settings import CONFIG_NAME, read_settings
from mergetool.checkpoints.vocabulary import tokens_of
from mergetool.tensors.dtypes import BY_NAME, DType
from mergetool.tensors.factors import Halves, nothing_added, side_by_side
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import NOTHING, FileStamp, ModelSource, OpenFile

_FLOAT32 = BY_NAME["F32"]


class AdapterSource(ModelSource):
    """`model` with one adapter on top. Changed tensors are float32; the others are as stored."""

    def __init__(self, model: ModelSource, folder: Path, elsewhere: Mapping[Path, OpenFile] = NOTHING) -> None:
        self._model = model
        self.folder, self.stem, self.remarks = model.folder, model.stem, model.remarks
        settings = read_settings(folder, model.folder)
        self._config = FileStamp.of(folder / CONFIG_NAME)  # its alpha decides about values as much as the weights do
        self._adapter_folder = folder
        self._adapter = open_weights(folder, elsewhere)
        matching = Matching(self._adapter.specs, model.specs, settings, read_config(model.folder), model.folder)
        self._changes = matching.changes
        self._arithmetic = Arithmetic(model, self._adapter)
        self.specs: Mapping[str, TensorSpec] = dict(model.specs) | {
            name: TensorSpec(name, self._dtype(change), change.shape) for name, change in self._changes.items()
        }
        self.made_for = settings.made_for
        """The model that the adapter was trained on, as training named it."""
        self.warnings = (*settings.warnings, *matching.warnings, *self._idle(folder))
        self.labels = _labels(folder)
        """id -> label of a head that the adapter brings, where its folder holds the trained model's config.json."""

    # ------------------------------------------------------------------ what it changes

    @property
    def adapted(self) -> frozenset[str]:
        """Tensors of the model that something is added to."""
        return frozenset(name for name, change in self._changes.items() if not change.is_copy)

    @property
    def replaced(self) -> frozenset[str]:
        """Tensors of the model that the adapter holds in full."""
        return frozenset(name for name, change in self._changes.items() if change.is_own and name in self._model.specs)

    @property
    def added(self) -> frozenset[str]:
        """Tensors that the model lacks."""
        return frozenset(self._changes.keys() - self._model.specs.keys())

    # ------------------------------------------------------------------ a model

    @property
    def described(self) -> Mapping[str, TensorSpec]:
        return self._model.described

    def stored_as(self, name: str) -> DType:
        change = self._changes.get(name)
        if change is None or change.is_copy:
            return super().stored_as(name) if change is not None else self._model.stored_as(name)
        if name in self._model.specs:
            return self._model.stored_as(name)
        return self._origin(change).stored_as(change.origin)

    @cached_property
    def tokenizer_folder(self) -> Path | None:
        """The adapter's, where training added tokens or numbered them anew."""
        own = tokens_of(self._adapter_folder)
        return self._model.tokenizer_folder if own in (None, tokens_of(self.folder)) else self._adapter_folder

    @property
    def files(self) -> tuple[FileStamp, ...]:
        return (*self._model.files, *self._adapter.files, self._config)

    def position(self, name: str) -> tuple[int, int]:
        change = self._changes.get(name)
        if change is not None and change.is_own:
            index, offset = self._adapter.position(change.origin)
            return len(self._model.files) + index, offset
        return self._model.position(change.origin if change is not None else name)

    def read_bytes(self, name: str, begin: int, buffer: memoryview) -> None:
        change = self._changes.get(name)
        if change is None:
            self._model.read_bytes(name, begin, buffer)
        elif change.is_copy:
            self._origin(change).read_bytes(change.origin, begin, buffer)
        else:
            import torch

            self._arithmetic.read(change, begin // 4, torch.frombuffer(buffer, dtype=torch.float32))

    def will_need(self, name: str, begin: int, length: int) -> None:
        change = self._changes.get(name)
        if change is None:
            self._model.will_need(name, begin, length)
        elif not change.is_own:
            bits = self._model.specs[change.origin].dtype.bits
            scale = bits if not change.is_copy else 32
            self._model.will_need(change.origin, begin * scale // 32, length * scale // 32)

    def close(self) -> None:
        self._model.close()
        self._adapter.close()

    # ------------------------------------------------------------------ what is added

    @property
    def origin(self) -> ModelSource:
        return self._model.origin

    def num_directions(self, name: str) -> int | None:
        change = self._changes.get(name)
        before = self._model.num_directions(name) if self._model.origin is not self._model else 0
        if change is None or before is None:
            return before
        if change.products is None:
            return None
        own = self._adapter.specs
        return before + sum(own[term.a].shape[0] // (term.block.count if term.block else 1) for term in change.products)

    def factors(self, name: str) -> Halves | None:
        if self.num_directions(name) is None:
            return None
        parts = [before] if (before := self._model.factors(name)) is not None else []  # of an adapter beneath
        if (change := self._changes.get(name)) is not None:
            parts += [self._arithmetic.halves(change, term) for term in change.products or ()]
        return side_by_side(parts) if parts else nothing_added(self.specs[name].shape)

    # ------------------------------------------------------------------ helpers

    def _origin(self, change: Change) -> ModelSource:
        return self._adapter if change.is_own else self._model

    def _dtype(self, change: Change) -> DType:
        return self._origin(change).specs[change.origin].dtype if change.is_copy else _FLOAT32

    def _idle(self, folder: Path) -> tuple[str, ...]:
        """A warning where every product is zero: an adapter as it is before training."""
        terms: list[LowRank | Added] = []
        for name, change in self._changes.items():
            if change.magnitude or change.rows or (change.is_copy and name not in self._model.specs):
                return ()
            terms += change.terms
        if not terms or any(change.is_copy for change in self._changes.values()):
            return ()
        return changes_nothing(self._adapter, terms, folder)


def _labels(folder: Path) -> Mapping[str, str]:
    labels: Any = read_config(folder).get("id2label")
    return labels if isinstance(labels, dict) else {}
