"""Directions that only a router compares inputs with: more of them, or fewer, than experts answer with.

The more experts share a bundle's space, the fewer directions each keeps; but of a router's few matrices all can be kept
that tell tasks apart. They lie in a file of their own, both sides of each, for what goes into a matrix is on the left
in some networks.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from mergetool.bundle.files import COMPARED, TensorWriter, spectrum_key, triplet_names
from mergetool.bundle.options import Experts, Options
from mergetool.bundle.ranks import columns, factor_specs
from mergetool.bundle.store import FactorStore
from mergetool.kernels.spectral import Factors
from mergetool.tensors.header import TensorSpec


def write_compared(
    experts: Experts, folder: Path, store: FactorStore, options: Options, names: Sequence[str], num_threads: int
) -> None:
    """Write every expert's directions of these matrices into a bundle, as many as its router asks for."""

    def of(name: str) -> list[Factors]:
        most = most_compared(experts.shapes[name], options)
        return [experts.change(task, name).compared(store, most) for task in experts.names]

    ranks = experts.share(lambda name: [part.rank for part in of(name)], names, num_threads)
    if not experts.leads:
        return
    shapes = {name: (experts.shapes[name], own) for name, own in zip(names, ranks, strict=True)}
    with TensorWriter(folder, COMPARED, compared_specs(shapes, options)) as writer:
        for name in names:
            for place, part in enumerate(of(name)):
                u, _, vh = triplet_names(spectrum_key(place, name))
                writer.put(u, part.u)
                writer.put(vh, part.v.mT)


def most_compared(shape: tuple[int, ...], options: Options) -> int:
    """Most directions of a matrix that are compared."""
    assert options.router is not None
    assert options.router.rank is not None
    return min(options.router.rank, shape[0], columns(shape))


def compared_specs(matrices: Mapping[str, tuple[tuple[int, ...], Sequence[int]]], options: Options) -> list[TensorSpec]:
    """What the file holds of matrices of these shapes, and so many directions of every task."""
    return [
        spec
        for name, (shape, ranks) in matrices.items()
        for place, rank in enumerate(ranks)
        for spec in factor_specs(spectrum_key(place, name), shape, rank, options)[:2]
    ]


def read_compared(folder: Path, names: Sequence[str], transposed: Sequence[bool], num_tasks: int) -> list[list[Tensor]]:
    """As `TaskFactors.bases`, from the file."""
    with safe_open(folder / COMPARED, framework="pt") as file:
        return [
            [
                (file.get_tensor(u).mT if turned else file.get_tensor(vh)).float().contiguous()
                for u, _, vh in (triplet_names(spectrum_key(place, name)) for place in range(num_tasks))
            ]
            for name, turned in zip(names, transposed, strict=True)
        ]
