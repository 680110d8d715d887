"""What an expert changed of one tensor: a dense difference, or the product of two factors that an adapter holds."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mergetool.bundle.store import FactorStore, Place
from mergetool.kernels.low_rank import Pair, triplets
from mergetool.kernels.spectral import Factors, Rank, kept
from mergetool.kernels.sums import all_finite
from mergetool.tensors.factors import Kept


class TaskVector(Protocol):
    """A tensor's task vector."""

    @property
    def num_directions(self) -> int | None:
        """How many directions it has at most, where that is known without computing them."""
        ...

    @property
    def is_stored(self) -> bool:
        """Whether it is what an earlier bundle kept."""
        return False

    @property
    def is_nothing(self) -> bool:
        """Whether all of it is zero."""
        ...

    @property
    def is_finite(self) -> bool: ...

    def factors(self, store: FactorStore, k: int) -> Factors:
        """At most k leading live singular triplets, float64, of the tensor seen as (rows, everything else)."""
        ...

    def leading(self, store: FactorStore, k: int) -> Factors:
        """The same, in the dtype in which they are at hand."""
        return self.factors(store, k).leading(k)

    def compared(self, store: FactorStore, k: int) -> Factors:
        """The directions that a router compares inputs with, as far as they are known: at most k, as `factors`."""
        return self.factors(store, k)

    def chosen(self, store: FactorStore, k: int, rank: Rank) -> Factors:
        """Of these the ones that are kept, where `rank` asks for a share of the energy."""
        return kept(self.factors(store, k), rank)

    def spectrum(self, chosen: Factors, k: int) -> Tensor:
        """The singular values that could be kept, of which `chosen` were."""
        return chosen.s

    def dense(self) -> Tensor:
        """All of it, in the tensor's shape; not to be changed."""
        ...

    def whole(self) -> Tensor:
        """The same, in the dtype in which it is at hand."""
        return self.dense()


@dataclass(frozen=True, eq=False)
class Difference(TaskVector):
    """The expert's tensor minus the base's. Its factors are worth keeping in the store."""

    delta: Tensor
    place: Place | None = None
    """Model and tensor."""
    num_directions = None

    @property
    def is_nothing(self) -> bool:
        return not bool(self.delta.any())

    @property
    def is_finite(self) -> bool:
        return all_finite(self.delta)

    def factors(self, store: FactorStore, k: int) -> Factors:
        return store.factors(self.delta.flatten(1), k, self.place)

    def dense(self) -> Tensor:
        return self.delta


@dataclass(frozen=True, eq=False)
class Product(TaskVector):
    """B A, as an adapter holds it. Its factors are quicker made again than read."""

    b: Tensor
    a: Tensor
    shape: tuple[int, ...]

    @property
    def num_directions(self) -> int:
        return self.b.shape[1]

    @property
    def is_nothing(self) -> bool:
        return not (bool(self.b.any()) and bool(self.a.any()))

    @property
    def is_finite(self) -> bool:
        return all_finite(self.b) and all_finite(self.a)

    def factors(self, store: FactorStore, k: int) -> Factors:
        return triplets(Pair(self.b, self.a)).leading(k)

    def dense(self) -> Tensor:
        return (self.b @ self.a).view(self.shape)


@dataclass(frozen=True, eq=False)
class StoredInFull(Difference):
    """What another bundle kept in full, in the dtype of that."""

    is_stored = True

    def factors(self, store: FactorStore, k: int) -> Factors:
        return store.factors(self.dense().flatten(1), k)

    def dense(self) -> Tensor:
        return self.delta.float()

    def whole(self) -> Tensor:
        return self.delta


@dataclass(frozen=True, eq=False)
class Stored(TaskVector):
    """What another bundle kept of it: cut further, but never computed anew."""

    parts: Factors
    """In the dtypes in which they are kept."""
    values: Tensor
    """The singular values that could have been kept."""
    shape: tuple[int, ...]
    read: Factors | None = None
    """Those that the bundle's router compared, if these were others; their sizes are not known."""
    is_stored = True

    @property
    def num_directions(self) -> int:
        return self.parts.rank

    def leading(self, store: FactorStore, k: int) -> Factors:
        return self.parts.leading(k)

    def compared(self, store: FactorStore, k: int) -> Factors:
        return (self.read or self.parts).leading(k).to(torch.float64)

    @property
    def is_nothing(self) -> bool:
        return self.parts.rank == 0

    @property
    def is_finite(self) -> bool:
        return all(map(all_finite, (self.parts.u, self.parts.s, self.parts.v)))

    def factors(self, store: FactorStore, k: int) -> Factors:
        return self.parts.leading(k).to(torch.float64)

    def chosen(self, store: FactorStore, k: int, rank: Rank) -> Factors:
        return self.parts.leading(k)  # a share of a share would be less than was asked for

    def spectrum(self, chosen: Factors, k: int) -> Tensor:
        return self.values[:k].double()

    def dense(self) -> Tensor:
        return self.parts.to(torch.float64).dense().view(self.shape)


def as_stored(kept: Kept, shape: tuple[int, ...]) -> TaskVector:
    """A change as an earlier bundle kept it."""
    if len(kept) == 1:
        return StoredInFull(kept[0])
    u, s, vh, values, *read = kept
    compared = Factors(read[0], read[0].new_zeros(read[0].shape[1]), read[1].mT) if read else None
    return Stored(Factors(u, s, vh.mT), values, shape, compared)


def directions_of(known: Iterable[int | None]) -> int | None:
    """How many directions one of several changes has at most; None where that is not known of all."""
    numbers = list(known)
    return None if None in numbers else max(number or 0 for number in numbers)
