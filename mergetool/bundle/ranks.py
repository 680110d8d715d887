"""How many directions of a tensor a bundle keeps at most, and what its files then hold: from headers alone."""

import math
from collections.abc import Mapping

from mergetool.arch.matrices import is_matrix
from mergetool.bundle.options import Options
from mergetool.kernels.spectral import rank_limit
from mergetool.tensors.dtypes import BY_NAME, BY_TORCH_NAME
from mergetool.tensors.header import TensorSpec

Shape = tuple[int, ...]


def columns(shape: Shape) -> int:
    """Columns of a tensor seen as a matrix of (rows, everything else)."""
    return math.prod(shape[1:])


def most_directions(name: str, shape: Shape, options: Options, num_tasks: int, changed: int | None = None) -> int:
    """Directions kept of one task; 0 where it is no matrix, or as factors neither smaller nor fit for routing.

    `changed`: how many directions experts changed at most, where that is known.
    """
    if not is_matrix(name, shape, options.filter, conv=options.conv):
        return 0
    most = rank_limit(options.rank, min(shape[0], columns(shape)), num_tasks)
    most = most if changed is None else min(most, changed)
    by_energy = isinstance(options.rank, Mapping) and changed is None
    return most if by_energy or is_worthwhile(shape, most, options) else 0


def is_worthwhile(shape: Shape, rank: int, options: Options) -> bool:
    """Whether factors of this rank are smaller than the matrix, or fit for routing."""
    rows, width = shape[0], columns(shape)
    smaller = rank * (rows + width + 1) < rows * width
    return smaller or (options.router is not None and rank < min(rows, width))


def factor_specs(name: str, shape: Shape, rank: int, options: Options) -> list[TensorSpec]:
    """What the file of one task holds of a tensor that is kept as so many directions."""
    dtype = BY_TORCH_NAME[options.dtype]
    return [
        TensorSpec(f"{name}.U", dtype, (shape[0], rank)),
        TensorSpec(f"{name}.Vh", dtype, (rank, columns(shape))),
        TensorSpec(f"{name}.S", BY_NAME["F32"], (rank,)),
    ]


def full_spec(name: str, shape: Shape, options: Options) -> TensorSpec:
    """What the file of one task holds of a tensor that is kept in full."""
    return TensorSpec(f"{name}.delta", BY_TORCH_NAME[options.dtype], shape)


def bytes_within(options: Options, base_bytes: int, most: int, least: int) -> int:
    """Bytes that factors take at most, of at least so many (one direction of every matrix) and at most so many."""
    return most if options.size is None else min(most, max(least, int(options.size * base_bytes)))
