"""What an architecture means, as data: every axis of every tensor carries the space it lives in.

An `ArchSpec` is what a family file (`arch/data/*.yaml`), a user's own file or a traced module becomes once it has met
the names and shapes of a real checkpoint: no forms are left, every size is a number. From it follow the
permutation groups of the network, shape checks, vocabulary axes, tied weights and the depth of a tensor. Aligning
asks the spec and compares no names. Planning does without one: layers are told by the numbers in names (`arch.depth`),
matrices and fused projections by patterns (`arch.matrices`).

The words (`Space`, `Factor`, `Layout`, `Group`, `Incidence`) are those of `mergetool.kernels.spaces`, where the
mathematics is told; here they get the names of tensors.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from mergetool.errors import PlanError
from mergetool.kernels.spaces import (
    Group,
    Incidence,
    Layout,
    Space,
    check_layout,
    groups,
    incidences,
    length,
)


@dataclass(frozen=True)
class TensorAxes:
    """One tensor: its shape and the layout of each axis (`()` for a scalar).

    `matched=False`: moved like the others, but left out when models are compared: running statistics, and the second
    name of a tied tensor. `depth`: (layer, number of layers), the layer counted from 0; None outside the repeated
    blocks. Every tower of a network (encoder, decoder) counts its own layers.
    """

    shape: tuple[int, ...]
    axes: tuple[Layout, ...]
    matched: bool = True
    depth: tuple[int, int] | None = None


@dataclass(frozen=True)
class ArchSpec:
    """A network's tensors over its spaces. Hashable by content (`digest`), free of torch.

    `tied`: stored names that hold one and the same tensor.
    """

    family: str
    spaces: Mapping[str, Space]
    tensors: Mapping[str, TensorAxes]
    tied: tuple[tuple[str, ...], ...] = ()

    @property
    def groups(self) -> tuple[Group, ...]:
        """The permutation groups of the network: each is one unknown of an alignment."""
        return groups(self.spaces)

    def layouts(self, *, matched: bool = True) -> dict[str, tuple[Layout, ...]]:
        """Layouts of the tensors that take part in matching: the matched ones with at least one movable axis.

        With `matched=False`, of every tensor.
        """
        return {
            name: tensor.axes
            for name, tensor in self.tensors.items()
            if not matched or (tensor.matched and any(self._moves(layout) for layout in tensor.axes))
        }

    def incidences(self, *, matched: bool = True) -> dict[str, tuple[Incidence, ...]]:
        """For each space, every place where it occurs: (tensor, axis, segment, position, ...)."""
        return incidences(self.layouts(matched=matched))

    def axes_in(self, space: str) -> tuple[tuple[str, int], ...]:
        """The (tensor, axis) pairs along which `space` occurs, e.g. all the vocabulary axes."""
        places = incidences(self.layouts(matched=False)).get(space, ())
        return tuple(dict.fromkeys((place.tensor, place.axis) for place in places))

    def digest(self) -> str:
        """sha256 over spaces and layouts: permutations stored with it fit this network and no other."""
        content = {
            "spaces": {name: asdict(space) for name, space in self.spaces.items()},
            "tensors": {name: asdict(tensor) for name, tensor in sorted(self.tensors.items())},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _moves(self, layout: Layout) -> bool:
        named = (factor.space for segment in layout for factor in segment if factor.space is not None)
        return any(self.spaces[name].symmetry != "fixed" for name in named)


def renamed(spec: ArchSpec, names: Mapping[str, str]) -> ArchSpec:
    """The spec of a file: its names, and of several names of one tensor those that it stores."""
    in_file = {names[name]: tensor for name, tensor in spec.tensors.items() if name in names}
    tied = []
    for group in spec.tied:
        stored = tuple(dict.fromkeys(names[name] for name in group if name in names))
        in_file |= {name: replace(in_file[name], matched=k == 0) for k, name in enumerate(stored)}
        tied += [stored] if len(stored) > 1 else []
    return replace(spec, tensors=in_file, tied=tuple(tied))


def check(spec: ArchSpec) -> ArchSpec:
    """`spec` itself, once every layout fits its tensor. Raises PlanError naming the tensor and the axis."""
    for name, tensor in spec.tensors.items():
        if len(tensor.axes) != len(tensor.shape):
            raise PlanError(
                f"the tensor has {len(tensor.shape)} axes {tensor.shape}, the spec describes {len(tensor.axes)}",
                where=f"architecture {spec.family}: {name}",
                fix="list one layout per axis",
            )
        for axis, (size, layout) in enumerate(zip(tensor.shape, tensor.axes, strict=True)):
            where = f"architecture {spec.family}: {name}, axis {axis}"
            if length(layout) != size:
                raise PlanError(f"the axis has length {size}, its layout {length(layout)}", where=where)
            try:
                check_layout(spec.spaces, layout)
            except ValueError as error:
                raise PlanError(str(error), where=where) from None
    return spec


def check_structure(spec: ArchSpec) -> None:
    """What can be said without a module: a space met by one segment of one matrix only has nothing to undo its moves.

    Raises PlanError naming the tensor and the axis.
    """
    places = spec.incidences(matched=False)
    for name, space in spec.spaces.items():
        where = {(place.tensor, place.axis, place.segment) for place in places.get(name, ())}
        matrices = {place for place in where if len(spec.tensors[place[0]].shape) > 1}
        if space.symmetry != "fixed" and where and len(matrices) < 2:
            tensor, axis, _ = sorted(matrices or where)[0]
            raise PlanError(
                f"space {name!r} is met on one axis of one matrix only, so nothing undoes its permutation",
                where=f"architecture {spec.family}: {tensor}, axis {axis}",
                fix="name the space on the axis that reads it, or declare it `fixed`",
            )


def check_shapes(spec: ArchSpec, shapes: Mapping[str, tuple[int, ...]], model: str) -> None:
    """Raise PlanError unless `model` has exactly the tensors and shapes of `spec`."""
    for name, tensor in spec.tensors.items():
        if name not in shapes:
            raise PlanError(f"tensor {name} is missing, the architecture {spec.family} has it", where=model)
        if tuple(shapes[name]) != tensor.shape:
            raise PlanError(
                f"{name} is {tuple(shapes[name])}, the architecture {spec.family} has {tensor.shape}",
                where=model,
                fix="align models of equal architecture and width",
            )
    unknown = sorted(set(shapes) - set(spec.tensors))
    if unknown:
        raise PlanError(f"tensor {unknown[0]} is not part of the architecture {spec.family}", where=model)
