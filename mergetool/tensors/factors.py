"""What was added to a tensor, as two factors: B A, with B (rows, r) and A (r, everything else), float32.

A source that knows its tensors as those of another model, its `origin`, plus such products says so with
`ModelSource.factors`: whoever can work with few directions then never forms a dense matrix, nor reads the origin.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Halves = tuple["Tensor", "Tensor"]
"""B and A; the factor that an adapter puts on its product is in B."""


@dataclass(frozen=True)
class KeptChange:
    """A change as a bundle keeps it; nothing of it is read before it is asked for."""

    directions: int | None
    """r; None: kept in full."""
    parts: Callable[[], tuple["Tensor", ...]]
    """U (rows, r), S (r), Vh (r, everything else); or all of it alone."""
    spectrum: Callable[[], "Tensor"]
    """The singular values that could have been kept, more than r where space was short."""
    compared: Callable[[], "tuple[Tensor, ...] | None"]
    """U and Vh of what a router compares, if these are others."""


def nothing_added(shape: tuple[int, ...]) -> Halves:
    """No directions, of a tensor of this shape."""
    import torch

    return torch.zeros(shape[0] if shape else 1, 0), torch.zeros(0, math.prod(shape[1:]))


def side_by_side(parts: Sequence[Halves]) -> Halves:
    """The sum of several products, as one."""
    import torch

    if len(parts) == 1:
        return parts[0]
    return torch.cat([b for b, _ in parts], 1), torch.cat([a for _, a in parts], 0)
