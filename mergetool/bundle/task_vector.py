"""What an expert changed of one tensor: a dense difference, or the product of two factors that an adapter holds."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from mergetool.bundle.store import FactorStore, Place
from mergetool.errors import MergeError
from mergetool.kernels.low_rank import Pair, triplets
from mergetool.kernels.spectral import Factors, Rank, kept
from mergetool.kernels.sums import all_finite
from mergetool.tensors.factors import KeptChange


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

    def chosen(self, store: FactorStore, k: int, rank: Rank, room: int) -> tuple[int, Tensor]:
        """How many of at most k are kept, by a share of the energy where `rank` asks for one; and the singular values,
        at most `room`, that could have been."""
        chosen = kept(self.factors(store, k), rank)
        return chosen.rank, chosen.s

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
    """What another bundle kept of it: cut further, but never computed anew, and read when it is needed."""

    kept: KeptChange
    shape: tuple[int, ...]
    device: torch.device
    is_stored = True

    @cached_property
    def parts(self) -> Factors:
        """In the dtypes in which they are kept."""
        u, s, vh = (part.to(self.device) for part in self.kept.parts())
        return Factors(u, s, vh.mT)

    @property
    def num_directions(self) -> int:
        return self.kept.directions or 0

    def leading(self, store: FactorStore, k: int) -> Factors:
        return self.parts.leading(k)

    def compared(self, store: FactorStore, k: int) -> Factors:
        if (read := self.kept.compared()) is None:
            return self.factors(store, k)
        u, vh = (part.to(self.device, torch.float64) for part in read)  # their sizes are not known
        return Factors(u, u.new_zeros(u.shape[1]), vh.mT).leading(k)

    @property
    def is_nothing(self) -> bool:
        return self.num_directions == 0

    @property
    def is_finite(self) -> bool:
        return all(map(all_finite, (self.parts.u, self.parts.s, self.parts.v)))

    def factors(self, store: FactorStore, k: int) -> Factors:
        return self.parts.leading(k).to(torch.float64)

    def chosen(self, store: FactorStore, k: int, rank: Rank, room: int) -> tuple[int, Tensor]:
        # A share of a share would be less than was asked for.
        return min(k, self.num_directions), self.kept.spectrum()[:room].double()

    def dense(self) -> Tensor:
        return self.parts.to(torch.float64).dense().view(self.shape)


def as_stored(kept: KeptChange, shape: tuple[int, ...], device: torch.device) -> TaskVector:
    """A change as an earlier bundle kept it."""
    if kept.directions is None:
        return StoredInFull(kept.parts()[0].to(device))
    return Stored(kept, shape, device)


def check_finite(task: str, name: str, is_finite: bool) -> None:
    """Raises MergeError for a change of a tensor that is not."""
    if not is_finite:
        what = "holds values that are not finite, or the base does"
        raise MergeError(what, f"model {task!r}: {name}", "repair or replace that model")


def directions_of(known: Iterable[int | None]) -> int | None:
    """How many directions one of several changes has at most; None where that is not known of all."""
    numbers = list(known)
    return None if None in numbers else max(number or 0 for number in numbers)
