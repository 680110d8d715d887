"""Bundles around a merged model (Twin-Merging): its base is the base plus the sum of all changes, times a scale.

merge      tensor by tensor, shared out: the merged tensor, in the base's dtype, into a file of its own
build      as any bundle of factors, of what experts differ by from the merged model

What each expert differs by is told from the merged model as it was rounded. The tensors of one model are read several
times: once for the merge, and for each thing that is done to a change.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from mergetool.bundle.build import Work, build
from mergetool.bundle.files import TensorWriter, copy_files, small_files
from mergetool.bundle.manifest import Base, Manifest
from mergetool.bundle.options import Experts, Options
from mergetool.bundle.present import PresentedSource
from mergetool.bundle.store import FactorStore
from mergetool.bundle.task_vector import Difference, TaskVector
from mergetool.errors import MergeError
from mergetool.tensors.dtypes import torch_dtype
from mergetool.tensors.io import bytes_of, sha256_file
from mergetool.tensors.source import SINGLE_NAME, ModelSource
from mergetool.tensors.writer import write_tensors

_PARTS = ".merged"
T = TypeVar("T")


def build_around(
    experts: Experts, folder: Path, store: FactorStore, options: Options, num_threads: int = 1
) -> Manifest | None:
    """Write a bundle around the merged model into `folder`, as `mergetool.bundle.build.build` does one of factors."""
    around = _Around(experts, folder / _PARTS, options.scale)
    (folder / _PARTS).mkdir(exist_ok=True)
    experts.share(around.merge, [*experts.shapes], num_threads)
    manifest = build(around, folder, store, options, num_threads, _WorkAround)
    if experts.leads:
        shutil.rmtree(folder / _PARTS)
    return manifest


class _Around(Experts):
    """Experts, seen from the merged model."""

    def __init__(self, experts: Experts, parts: Path, scale: float) -> None:
        self._experts, self._parts, self._scale = experts, parts, scale
        self.names, self.sources, self.heads, self.shapes = (
            experts.names,
            experts.sources,
            experts.heads,
            experts.shapes,
        )

    def merge(self, name: str) -> None:
        """Keep the merged tensor."""
        base = self._experts.read("base", name)
        total = torch.zeros_like(base, dtype=torch.float64)
        for task in self.names:
            change = self._experts.change(task, name)
            if not change.is_finite:
                what = "holds values that are not finite, or the base does"
                raise MergeError(what, f"model {task!r}: {name}", "repair or replace that model")
            total += change.dense()
        merged = (base.double() + self._scale * total).to(torch_dtype(self.sources["base"].specs[name].dtype))
        write_tensors(self._part(name), {"merged": merged.cpu()}, {"format": "pt"})

    def merged(self, name: str) -> Tensor:
        """The merged tensor, as it is stored."""
        with safe_open(self._part(name), framework="pt") as file:
            kept: Tensor = file.get_tensor("merged")
        return kept

    def _part(self, name: str) -> Path:
        return self._parts / f"{[*self.shapes].index(name)}.safetensors"

    def read(self, model: str, name: str) -> Tensor:
        return self._experts.read(model, name)

    def change(self, model: str, name: str) -> TaskVector:
        base = self._experts.read("base", name)
        return Difference(self._experts.change(model, name).dense() - (self.merged(name).to(base) - base))

    def share(self, call: Callable[[str], T], items: Sequence[str], num_threads: int) -> Sequence[T]:
        return self._experts.share(call, items, num_threads)

    @property
    def device(self) -> torch.device:
        return self._experts.device

    @property
    def leads(self) -> bool:
        return self._experts.leads

    def digests(self, model: str) -> Mapping[str, str]:
        return self._experts.digests(model)

    def provenance(self, task: str) -> tuple[str, Mapping[str, str]]:
        return self._experts.provenance(task)


class _WorkAround(Work):
    """One build, whose base is the merged model."""

    def write_base(self) -> Base:
        """The merged model with what else the base holds, in one file, and the base's config and tokenizer."""
        assert isinstance(self.experts, _Around)
        source = whole_of(self.experts.sources["base"])
        path = f"base/{SINGLE_NAME}"
        with TensorWriter(self.folder, path, list(source.specs.values())) as writer:
            for name in source.specs:
                writer.put(name, self.experts.merged(name) if name in self.experts.shapes else _stored(source, name))
        if source.folder is not None:
            copy_files(small_files(source.folder), self.folder / "base")
        return Base(kind="copy", path="base", files={SINGLE_NAME: sha256_file(self.folder / path)})


def whole_of(base: ModelSource) -> ModelSource:
    """The base with what no expert shares."""
    return base.model if isinstance(base, PresentedSource) else base


def _stored(source: ModelSource, name: str) -> Tensor:
    stored = torch.empty(source.specs[name].shape, dtype=torch_dtype(source.specs[name].dtype))
    source.read_bytes(name, 0, bytes_of(stored.reshape(-1)))
    return stored
