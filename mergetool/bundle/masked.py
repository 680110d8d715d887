"""Make a bundle of masks: one change that all experts share, a mask of it for each, and directions for the router.

survey     tensor by tensor, shared out: the shared change, rounded as it is stored, and how large all changes are
directions of the matrices that routing reads: leading singular triplets (through the store)
write      the shared change by the leader; then task by task, shared out: its masks, and its directions

Masks and scales are those of the shared change as it was rounded. The tensors of one model are read twice.
"""

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from mergetool.arch.matrices import is_matrix
from mergetool.bundle.alike import alike
from mergetool.bundle.build import Work
from mergetool.bundle.files import SHARED, TensorWriter, factors_path, triplet_names
from mergetool.bundle.manifest import Manifest, Parameter
from mergetool.bundle.masks import mask_of
from mergetool.bundle.options import Experts, Options
from mergetool.bundle.ranks import factor_specs
from mergetool.bundle.routed import routing_matrices
from mergetool.bundle.store import FactorStore
from mergetool.kernels.spectral import rank_limit
from mergetool.kernels.unified import elected, in_step, its_own, packed, summed
from mergetool.tensors.dtypes import BY_NAME, BY_TORCH_NAME, torch_dtype
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.writer import write_tensors

_PARTS = ".shared"
Shape = tuple[int, ...]


class _Survey(NamedTuple):
    """What is found of one tensor."""

    moved: tuple[bool, ...]
    """Whether each expert changed it."""
    sizes: tuple[float, ...]
    """The mean size of each expert's change."""
    kept: tuple[float, ...]
    """The mean size of what its mask keeps of the shared change."""


def build_masked(
    experts: Experts, folder: Path, store: FactorStore, options: Options, num_threads: int = 1
) -> Manifest | None:
    """Write a bundle of masks into `folder`, as `mergetool.bundle.build.build` does one of factors."""
    work = _MaskedWork(experts, folder, store, options)
    heads = work.write_heads() if experts.leads else {}
    (folder / _PARTS).mkdir(exist_ok=True)
    names = [*experts.shapes]
    surveys = dict(zip(names, experts.share(work.survey, names, num_threads), strict=True))
    parameters = {name: work.parameter(name, found) for name, found in surveys.items()}
    read = work.routed(surveys)
    found = experts.share(lambda name: work.directions(name, parameters[name]), read, num_threads)
    parameters |= dict(zip(read, found, strict=True))
    if experts.leads:
        work.write_shared(parameters)
    paths = experts.share(lambda task: work.write_masks(task, parameters), experts.names, num_threads, "writing masks")
    if not experts.leads:
        return None
    shutil.rmtree(folder / _PARTS)
    apart = {name: parameters[name].model_copy(update={"policy": "svd"}) for name in read}
    router = work.router(parameters | apart)
    files = dict(zip(experts.names, paths, strict=True))
    manifest = work.finish(work.write_base(), work.tasks(files, heads, work.scales(surveys)), parameters, router)
    if router is not None:
        experts.met(alike(folder, manifest))
    return manifest


class _MaskedWork(Work):
    """One build of masks."""

    # ---------------------------------------------------------------- what is shared

    def survey(self, name: str) -> _Survey:
        """Keep the shared change of a tensor, and tell of all changes."""
        changes = [change.dense() for change in self._changes(name)]
        shared = (elected(changes) if self.options.kind == "emr" else summed(changes)).to(self._dtype)
        self._keep(name, shared)
        kept = [shared.float() * self._mask(change, shared) for change in changes]
        return _Survey(
            tuple(bool(change.any()) for change in changes), *(tuple(map(_size, each)) for each in (changes, kept))
        )

    def _mask(self, change: Tensor, shared: Tensor) -> Tensor:
        """An expert's mask of a tensor."""
        shared = shared.to(change.dtype)
        if self.options.kind == "emr":
            return in_step(change, shared)
        return its_own(change, shared, self.options.margin)

    def _keep(self, name: str, shared: Tensor) -> None:
        write_tensors(self._part(name), {"shared": shared.cpu()}, {"format": "pt"})

    def _kept(self, name: str) -> Tensor:
        with safe_open(self._part(name), framework="pt") as file:
            kept: Tensor = file.get_tensor("shared")
        return kept

    def _part(self, name: str) -> Path:
        return self.folder / _PARTS / f"{[*self.experts.shapes].index(name)}.safetensors"

    @property
    def _dtype(self) -> torch.dtype:
        return torch_dtype(BY_TORCH_NAME[self.options.dtype])

    def parameter(self, name: str, found: _Survey) -> Parameter:
        """How a tensor is kept."""
        return Parameter(policy="mask" if any(found.moved) else "skip", shape=self.experts.shapes[name])

    def scales(self, surveys: Mapping[str, _Survey]) -> Mapping[str, float]:
        """EMR's scale of every task: the sizes of its change over those of what its masks keep, over all tensors."""
        if self.options.kind != "emr":
            return {}
        return {task: _scale(place, surveys.values()) for place, task in enumerate(self.experts.names)}

    # ---------------------------------------------------------------- what routing reads

    def routed(self, surveys: Mapping[str, _Survey]) -> tuple[str, ...]:
        """The matrices of which directions are kept, if there is a router and something to choose."""
        if self.options.router is None or len(self.experts.names) == 1:
            return ()
        changed = {name: [int(moved) for moved in found.moved] for name, found in surveys.items()}
        return matrices_to_route(changed, self.experts.shapes, self.options)

    def directions(self, name: str, parameter: Parameter) -> Parameter:
        """The parameter with how many directions of each task are kept, which are in the store then."""
        most = self._most(parameter.shape)
        chosen = [change.chosen(self.store, most, self.options.rank, most) for change in self._changes(name)]
        return parameter.model_copy(update={"ranks": tuple(rank for rank, _ in chosen)})

    def _most(self, shape: Shape) -> int:
        return rank_limit(self.options.rank, min(shape), len(self.experts.names))

    # ---------------------------------------------------------------- files

    def write_shared(self, parameters: Mapping[str, Parameter]) -> None:
        """The shared change of all tensors, in one file."""
        names = [name for name, parameter in parameters.items() if parameter.policy == "mask"]
        specs = [shared_spec(name, parameters[name].shape, self.options) for name in names]
        with TensorWriter(self.folder, SHARED, specs) as writer:
            for name in names:
                writer.put(name, self._kept(name))

    def write_masks(self, task: str, parameters: Mapping[str, Parameter]) -> str:
        """Write one task's file; its path in the bundle."""
        place = self.experts.names.index(task)
        masked = {name: parameter for name, parameter in parameters.items() if parameter.policy == "mask"}
        specs: list[TensorSpec] = []
        for name, parameter in masked.items():
            specs += [mask_spec(name, parameter.shape)]
            if parameter.ranks and (rank := parameter.ranks[place]):
                specs += factor_specs(name, parameter.shape, rank, self.options)
        with TensorWriter(self.folder, factors_path(task), specs) as writer:
            for name, parameter in masked.items():
                change = self.experts.change(task, name)
                dense = change.dense()
                writer.put(mask_of(name), packed(self._mask(dense, self._kept(name).to(dense.device))))
                if parameter.ranks and (rank := parameter.ranks[place]):
                    factors = change.factors(self.store, self._most(parameter.shape)).leading(rank)
                    parts = (factors.u, factors.s, factors.v.mT)
                    for part, values in zip(triplet_names(name), parts, strict=True):
                        writer.put(part, values)
        return factors_path(task)


def matrices_to_route(
    ranks: Mapping[str, Sequence[int]], shapes: Mapping[str, Shape], options: Options
) -> tuple[str, ...]:
    """The matrices that routing reads, of those that may be taken apart. Raises PlanError."""
    assert options.router is not None
    known = {}
    for name, each in ranks.items():
        apart = any(each) and is_matrix(name, shapes[name], options.filter, conv=options.conv)
        known[name] = Parameter(policy="svd" if apart else "mask", shape=shapes[name], ranks=tuple(each))
    return routing_matrices(known, options.router.layers)


def shared_spec(name: str, shape: Shape, options: Options) -> TensorSpec:
    """What the shared file holds of a tensor."""
    return TensorSpec(name, BY_TORCH_NAME[options.dtype], shape)


def mask_spec(name: str, shape: Shape) -> TensorSpec:
    """What a task's file holds of a tensor."""
    return TensorSpec(mask_of(name), BY_NAME["U8"], (-(-torch.Size(shape).numel() // 8),))


def _size(change: Tensor) -> float:
    return float(change.double().abs().mean()) if change.numel() else 0.0


def _scale(place: int, surveys: Collection[_Survey]) -> float:
    kept = sum(found.kept[place] for found in surveys)
    return sum(found.sizes[place] for found in surveys) / kept if kept else 1.0
