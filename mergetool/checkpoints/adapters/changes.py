"""What an adapter does to one tensor of a model, as data.

    W'  =  origin + sum of terms,   then DoRA's magnitudes,   then rows of single tokens

The origin is the model's tensor, or one that the adapter brings. A tensor is seen as a matrix of rows and columns: a
convolution's axes after the first are its columns, the layers of a mixture lie one below the other.
"""

from dataclasses import dataclass, replace
from math import prod


@dataclass(frozen=True)
class Block:
    """Where one layer of a mixture lies in factors that were trained for all of them together."""

    count: int
    """Layers that the factors hold."""
    index: int | None = None
    """The layer; None: the tensor holds all of them."""
    first: int = 0
    """Its first output within the layer's product (the up half of a fused gate and up comes second)."""


@dataclass(frozen=True)
class LowRank:
    """`factor * B @ A`, or its transpose."""

    a: str
    b: str
    factor: float
    transposed: bool = False
    block: Block | None = None

    @property
    def is_of_all_experts(self) -> bool:
        """Whether the tensor holds all layers of a mixture, each with a product of its own."""
        return self.block is not None and self.block.index is None


@dataclass(frozen=True)
class Added:
    """`factor` times a tensor of the adapter of the same shape (a trained bias)."""

    own: str
    factor: float


@dataclass(frozen=True)
class Magnitude:
    """DoRA: the length of every row (or column) is a parameter of its own."""

    own: str
    by_row: bool


@dataclass(frozen=True)
class Rows:
    """Rows that the adapter holds in full."""

    own: str
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Change:
    """All that an adapter does to one tensor."""

    name: str
    shape: tuple[int, ...]
    origin: str
    """The name of W, in the model or in the adapter."""
    is_own: bool = False
    """Whether the adapter brings W."""
    terms: tuple[LowRank | Added, ...] = ()
    magnitude: Magnitude | None = None
    rows: tuple[Rows, ...] = ()

    @property
    def is_copy(self) -> bool:
        return not self.terms and self.magnitude is None and not self.rows

    @property
    def products(self) -> tuple[LowRank, ...] | None:
        """The terms, where the tensor is the model's own of this name plus products of matrices; else None."""
        products = tuple(term for term in self.terms if isinstance(term, LowRank) and not term.is_of_all_experts)
        plain = not self.is_own and self.origin == self.name and self.magnitude is None and not self.rows
        return products if plain and 0 < len(products) == len(self.terms) else None

    @property
    def width(self) -> int:
        """Columns of the matrix."""
        if any(isinstance(term, LowRank) and term.block for term in self.terms):
            return self.shape[-1]
        return prod(self.shape[1:])

    def with_term(self, term: LowRank | Added) -> "Change":
        return replace(self, terms=(*self.terms, term))
