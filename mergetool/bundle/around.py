"""Bundles around a merged model: its base is the base plus the sum of all changes, times a scale.

Twin-Merging merges everything, and keeps what experts differ by from that. WEMoE merges only what is not in MLPs, and
keeps what experts changed of those.

merge      tensor by tensor, shared out: the merged tensor, in the base's dtype, into a file of its own
build      as any bundle of factors, of what experts differ by from the merged model

What each expert differs by is told from the merged model as it was rounded. The tensors of one model are read several
times: once for the merge, and for each thing that is done to a change.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from mergetool.arch.matrices import is_of_mlp
from mergetool.bundle.alike import Alike
from mergetool.bundle.build import Work, build
from mergetool.bundle.files import TensorWriter, copy_files, small_files
from mergetool.bundle.manifest import Base, Manifest
from mergetool.bundle.options import TAKING, Experts, Options
from mergetool.bundle.present import PresentedSource
from mergetool.bundle.store import FactorStore
from mergetool.bundle.task_vector import Difference, TaskVector, check_finite
from mergetool.errors import PlanError
from mergetool.tensors.dtypes import torch_dtype
from mergetool.tensors.io import sha256_file
from mergetool.tensors.source import SINGLE_NAME, ModelSource, read_whole
from mergetool.tensors.writer import write_tensors

_PARTS = ".merged"
T = TypeVar("T")


def build_around(
    experts: Experts, folder: Path, store: FactorStore, options: Options, num_threads: int = 1
) -> Manifest | None:
    """Write a bundle around the merged model into `folder`, as `mergetool.bundle.build.build` does one of factors."""
    around = _Around(experts, folder / _PARTS, options)
    (folder / _PARTS).mkdir(exist_ok=True)
    experts.share(around.merge, [*experts.shapes], num_threads)
    manifest = build(around, folder, store, options, num_threads, _WorkAround)
    if experts.leads:
        shutil.rmtree(folder / _PARTS)
    return manifest


class _Around(Experts):
    """Experts, seen from the merged model."""

    def __init__(self, experts: Experts, parts: Path, options: Options) -> None:
        self._experts, self._parts, self._options = experts, parts, options
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
            check_finite(task, name, change.is_finite)
            total += change.dense()
        scale = 0.0 if self._options.own != "all" and is_own(name, self._options) else self._options.scale
        merged = (base.double() + scale * total).to(torch_dtype(self.sources["base"].specs[name].dtype))
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
        if not is_own(name, self._options):
            return Difference(torch.zeros(self.shapes[name], device=self.device))
        base = self._experts.read("base", name)
        return Difference(self._experts.change(model, name).dense() - (self.merged(name).to(base) - base))

    def trained(self, model: str, name: str) -> Tensor:
        """What an expert changed of the base's tensor."""
        return self._experts.change(model, name).dense()

    def share(
        self, call: Callable[[str], T], items: Sequence[str], num_threads: int, label: str = TAKING
    ) -> Sequence[T]:
        return self._experts.share(call, items, num_threads, label)

    def met(self, pairs: Sequence[Alike]) -> None:
        self._experts.met(pairs)

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

    def _whole_change(self, task: str, name: str) -> Tensor | None:
        """What training changed, and not what the expert differs by from the merged model."""
        assert isinstance(self.experts, _Around)
        return self.experts.trained(task, name) if name in self.experts.shapes else None

    def write_base(self) -> Base:
        """The merged model with what else the base holds, in one file, and the base's config and tokenizer."""
        assert isinstance(self.experts, _Around)
        source = whole_of(self.experts.sources["base"])
        path = f"base/{SINGLE_NAME}"
        with TensorWriter(self.folder, path, list(source.specs.values())) as writer:
            for name in source.specs:
                writer.put(name, self.experts.merged(name) if name in self.experts.shapes else read_whole(source, name))
        if source.folder is not None:
            copy_files(small_files(source.folder), self.folder / "base")
        return Base(kind="copy", path="base", files={SINGLE_NAME: sha256_file(self.folder / path)})


def is_own(name: str, options: Options) -> bool:
    """Whether experts keep something of a tensor for themselves."""
    if isinstance(options.own, tuple):
        return any(fnmatchcase(name, glob) for glob in options.own)
    return options.own == "all" or is_of_mlp(name)


def check_own(names: Sequence[str], options: Options) -> None:
    """Raises PlanError where experts would keep nothing for themselves."""
    if any(is_own(name, options) for name in names):
        return
    what = (
        "no tensor is of an MLP by its name" if options.own == "mlp" else f"no tensor matches {', '.join(options.own)}"
    )
    raise PlanError(what, "merge.layers", f"write layers: with globs on names such as {names[0]}")


def whole_of(base: ModelSource) -> ModelSource:
    """The base with what no expert shares."""
    return base.model if isinstance(base, PresentedSource) else base
