"""Units of every model as mixtures of the units of one common network, and the other way round.

Where permutations are not enough (units are merged, or models have other numbers of them), each space of a model has
two matrices. `gather` makes the common units of the model's and acts where units are written; `spread` tells the
model's units by the common ones and acts where they are read. A layer W so becomes `gather W spread`.

    alignment/maps.safetensors   of every model and space `model/space/gather` (common, own) and `spread` (own, common)
    alignment/report.json        what happened
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergetool.alignment.activations import Table, said
from mergetool.alignment.fitted import METADATA, REPORT
from mergetool.alignment.task import spec_of
from mergetool.arch.spec import ArchSpec
from mergetool.errors import PlanError
from mergetool.kernels.spaces import Factor, Layout
from mergetool.networks.trace import resolve
from mergetool.tensors.dtypes import BY_NAME
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.io import write_error
from mergetool.tensors.writer import write_file, write_tensors

if TYPE_CHECKING:
    from mergetool.alignment.models import Models
    from mergetool.alignment.options import MatchBy

MAPS = "alignment/maps.safetensors"
_FIX = "use c2m3, which permutes heads, signs and all"


@dataclass(frozen=True)
class UnitMap:
    """Of one space of one model; both in float64."""

    gather: Tensor
    spread: Tensor


@dataclass(frozen=True)
class Mapped:
    """The maps of every model, by its name and that of the space; what is not there stays as it is."""

    spec: ArchSpec
    maps: Mapping[str, Mapping[str, UnitMap]]
    report: Mapping[str, Any] = field(default_factory=dict)

    def shown(self, spec: TensorSpec) -> TensorSpec:
        """What a tensor is in the common network: in float32 or better, since it is rounded after it is merged."""
        if spec.name not in self.spec.tensors:
            return spec
        dtype = spec.dtype if spec.dtype.bits >= 32 else BY_NAME["F32"]
        return replace(spec, shape=self.spec.tensors[spec.name].shape, dtype=dtype)

    def apply(self, model: str, name: str, tensor: Tensor) -> Tensor:
        """A tensor of a model, in the common network."""
        if name not in self.spec.tensors:
            return tensor
        wanted = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        return carried(self.spec, self.maps[model], name, tensor).to(wanted)

    def save(self, folder: Path) -> None:
        """Write both files, the maps last. Raises OutputError."""
        arrays = {
            f"{model}/{space}/{kind}": getattr(both, kind).contiguous()
            for model, spaces in self.maps.items()
            for space, both in spaces.items()
            for kind in ("gather", "spread")
        }
        unfinished = folder / f"{MAPS}.unfinished"
        unfinished.parent.mkdir(exist_ok=True)
        write_file(folder / REPORT, json.dumps(self.report, indent=1) + "\n")
        try:
            write_tensors(unfinished, arrays, {METADATA: json.dumps({"spec": self.spec.digest()})})
            unfinished.rename(folder / MAPS)
        except OSError as error:
            raise write_error(error, str(unfinished)) from error


def load_maps(folder: Path, models: "Models") -> Mapped | None:
    """What an earlier, killed run of the same recipe left in its unfinished folder, or None."""
    from safetensors.torch import load_file

    if not (folder / MAPS).is_file():
        return None
    spec, found = spec_of(models), load_file(folder / MAPS)
    maps = {
        model: {
            space: UnitMap(found[f"{model}/{space}/gather"], found[f"{model}/{space}/spread"])
            for space in spec.spaces
            if f"{model}/{space}/gather" in found
        }
        for model in models.names
    }
    return Mapped(spec, maps)


def written_axis(spec: ArchSpec, name: str) -> int | None:
    """The axis of a tensor along which units are written: that of its bias. None where nothing tells."""
    axes = spec.tensors[name].axes
    bias = spec.tensors.get(f"{name.removesuffix('weight')}bias")
    alike = [axis for axis, layout in enumerate(axes) if bias is not None and layout == bias.axes[0]]
    if len(alike) == 1:
        return alike[0]
    moving = [axis for axis, layout in enumerate(axes) if _moving(spec, layout)]
    looks_like_embedding = moving == [1] and len(axes) == 2
    return None if looks_like_embedding and not _is_head(spec, name) else 0


def _is_head(spec: ArchSpec, name: str) -> bool:
    """Whether a matrix reads its units: some other layer writes them, and no other one reads them."""
    others = [axes for other, axes in spec.layouts(matched=False).items() if other != name and len(axes) > 1]
    read = _moving(spec, spec.tensors[name].axes[1])
    written = {space for axes in others for space in _moving(spec, axes[0])}
    return read <= written and not any(read & _moving(spec, layout) for axes in others for layout in axes[1:])


def mappable(spec: ArchSpec) -> tuple[str, ...]:
    """The spaces whose units can be mixed: no heads, no signs. Raises PlanError where there is none."""
    inside = {space.within for space in spec.spaces.values()}
    plain = [n for n, s in spec.spaces.items() if s.symmetry == "permutation" and s.within is None and n not in inside]
    unclear = {
        space
        for name, axes in spec.layouts(matched=False).items()
        if any(name in tied for tied in spec.tied) or written_axis(spec, name) is None
        for layout in axes
        for space in _moving(spec, layout)
    }
    found = tuple(name for name in plain if name not in unclear)
    if not found:
        what = f"the architecture {spec.family!r} has no units that could be mixed: all are of heads, or have signs"
        raise PlanError(what, "architecture", _FIX)
    return found


def carried(spec: ArchSpec, maps: Mapping[str, UnitMap], name: str, tensor: Tensor) -> Tensor:
    """A tensor with the maps of its axes applied, in float64."""
    written, tensor = written_axis(spec, name), tensor.double()
    for axis, layout in enumerate(spec.tensors[name].axes):
        chosen = {space: maps[space] for space in _moving(spec, layout) if space in maps}
        if chosen:
            matrices = {space: both.gather if axis == written else both.spread.T for space, both in chosen.items()}
            tensor = _mixed(tensor, axis, layout, matrices)
    return tensor


def _mixed(tensor: Tensor, axis: int, layout: Layout, matrices: Mapping[str, Tensor]) -> Tensor:
    """An axis with a matrix (new, old) applied to the factors of some spaces."""
    acting = [[matrices.get(factor.space or "") for factor in segment] for segment in layout]
    own = [
        [factor.size if matrix is None else matrix.shape[1] for factor, matrix in zip(segment, those, strict=True)]
        for segment, those in zip(layout, acting, strict=True)
    ]
    parts = torch.split_with_sizes(tensor.movedim(axis, 0), [prod(sizes) for sizes in own])
    made = []
    for those, sizes, part in zip(acting, own, parts, strict=True):
        rest = part.shape[1:]
        view = part.reshape(*sizes, *rest)
        for place, matrix in enumerate(those):
            if matrix is not None:
                view = torch.tensordot(matrix.to(view), view, dims=([1], [place])).movedim(0, place)
        made.append(view.reshape(-1, *rest))
    return torch.cat(made).movedim(0, axis)


def _moving(spec: ArchSpec, layout: Layout) -> set[str]:
    named = {factor.space for segment in layout for factor in segment if factor.space is not None}
    return {name for name in named if spec.spaces[name].symmetry != "fixed"}


Profiles = Sequence[Tensor]
"""What tells the units of a space apart, of every model: (units, features), features of all models the same."""


class Evidence:
    """Profiles of one space after the other, in the network's order, once those before are settled.

    Raises PlanError for models whose shapes differ in more than the units that can be mapped.
    """

    def __init__(self, match: "MatchBy", models: "Models") -> None:
        self._models = models
        self.spec = spec_of(models)
        self._spaces = mappable(self.spec)
        self._specs = [_own_spec(models, name, self.spec, self._spaces) for name in models.names]
        self.maps: dict[str, dict[str, UnitMap]] = {name: {} for name in models.names}
        self._tables: Sequence[Table] | None = None
        if match.by == "activations":
            odd = [name for name, own in zip(models.names, self._specs, strict=True) if own != self.spec]
            if odd:
                what = f"model {odd[0]!r} is of another width, and only networks of one width are run on data"
                raise PlanError(what, "merge.match", "write match: {by: weights}")
            layouts, self._tables = said(match, models, self.spec, models.names)
            self._layouts = {site: axes[1] for site, axes in layouts.items()}

    def spaces(self) -> tuple[str, ...]:
        """What is to be mapped, in order."""
        return self._spaces

    def read(self, model: int, space: str) -> Tensor:
        """How much each unit of a model is read: the norm of the weights that do."""
        spec, total = self._specs[model], torch.zeros((), dtype=torch.float64)
        for name, axes in spec.layouts(matched=True).items():
            for axis, layout in enumerate(axes):
                if axis != written_axis(spec, name) and space in _moving(spec, layout) and len(layout) == 1:
                    weights = self._models.read(self._models.names[model], name).double().cpu().movedim(axis, 0)
                    size = spec.spaces[space].size
                    total = total + weights.reshape(size, -1).square().sum(dim=1)
        return total.sqrt()

    def of(self, space: str) -> Profiles:
        """The profiles of a space. Raises PlanError where there are none."""
        found = [list(self._features(k, space)) for k in range(len(self._specs))]
        if not all(any(part.shape[1] > 1 for part in parts) for parts in found):
            what = f"no layer tells the units of {space} apart before others are known"
            raise PlanError(what, "merge.match", "write match: {by: activations, data: FILE}")
        return [torch.cat(parts, dim=1) for parts in found]

    def _features(self, model: int, space: str) -> Iterator[Tensor]:
        if self._tables is not None:
            for site, rows in self._tables[model].items():
                yield from _columns(rows, self._layouts[site], space)
            return
        spec, own = self._specs[model], self.maps[self._models.names[model]]
        for name, axes in spec.layouts(matched=True).items():
            written = written_axis(spec, name)
            others = {s for axis, layout in enumerate(axes) if axis != written for s in _moving(spec, layout)}
            unknown = others.intersection(self._spaces).difference(own)
            if written is not None and axes[written] == ((Factor(spec.spaces[space].size, space),),) and not unknown:
                x = carried(spec, own, name, self._models.read(self._models.names[model], name))
                yield x.movedim(written, 0).reshape(x.shape[written], -1)


def _own_spec(models: "Models", name: str, common: ArchSpec, mapped: Sequence[str]) -> ArchSpec:
    """What a model itself is. Raises PlanError where maps cannot give it the common shapes."""
    shapes = models.shapes_of(name)
    if all(shapes[tensor] == axes.shape for tensor, axes in common.tensors.items()):
        return common
    own = resolve(models.architecture, shapes, models.config)
    for tensor, there in common.tensors.items():
        if tuple(_resized(layout, common, mapped) for layout in own.tensors[tensor].axes) != there.axes:
            what = (
                f"shape {list(shapes[tensor])} in model {name!r}, {list(there.shape)} in the first, not in hidden units"
            )
            raise PlanError(what, tensor, "merge models that differ in the number of hidden units only")
    return own


def _resized(layout: Layout, common: ArchSpec, mapped: Sequence[str]) -> Layout:
    sizes = {space: common.spaces[space].size for space in mapped}
    return tuple(
        tuple(replace(factor, size=sizes.get(factor.space or "", factor.size)) for factor in segment)
        for segment in layout
    )


def _columns(rows: Tensor, layout: Layout, space: str) -> Iterator[Tensor]:
    """What the units of a space say: its part of a table, (units, positions and whatever else there is)."""
    for segment in layout:
        if segment[0].space == space and len(layout) == 1:
            rest = prod(factor.size for factor in segment[1:])
            yield rows.double().reshape(len(rows), -1, rest).movedim(1, 0).flatten(1).cpu()
