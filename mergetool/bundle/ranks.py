"""How many directions of a tensor a bundle keeps at most, and what its files then hold: from headers alone."""

import math
from collections.abc import Iterable, Mapping

from mergetool.arch.matrices import is_matrix
from mergetool.bundle.files import triplet_names, whole_name
from mergetool.bundle.options import Options
from mergetool.kernels.spectral import rank_limit
from mergetool.tensors.dtypes import BY_NAME, BY_TORCH_NAME, torch_dtype
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
    dtype, (u, s, vh) = BY_TORCH_NAME[options.dtype], triplet_names(name)
    return [
        TensorSpec(u, dtype, (shape[0], rank)),
        TensorSpec(vh, dtype, (rank, columns(shape))),
        TensorSpec(s, BY_NAME["F32"], (rank,)),
    ]


def full_spec(name: str, shape: Shape, options: Options) -> TensorSpec:
    """What the file of one task holds of a tensor that is kept in full."""
    return TensorSpec(whole_name(name), BY_TORCH_NAME[options.dtype], shape)


def counted_width(options: Options) -> int:
    """Bytes that a number of a factor counts."""
    return 2 if options.of_numbers else _width(options)


def most_bytes(options: Options, base: Iterable[TensorSpec]) -> int | None:
    """Bytes that the factors of all tasks may take, as they are counted, or None without a bound."""
    if options.size is None:
        return None
    if not options.of_numbers:
        return int(options.size * sum(spec.num_bytes for spec in base))
    whole = sum(4 * spec.num_elements if spec.dtype.is_float else spec.num_bytes for spec in base)
    return int(options.size * whole)


def bytes_within(options: Options, base: Iterable[TensorSpec], most: int, least: int) -> int:
    """Bytes that factors take at most, of at least so many (one direction of every matrix) and at most so many."""
    bound = most_bytes(options, base)
    return most if bound is None else min(most, max(least, bound * _width(options) // counted_width(options)))


def _width(options: Options) -> int:
    return torch_dtype(BY_TORCH_NAME[options.dtype]).itemsize
