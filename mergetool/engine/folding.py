"""Models that are read one after the other, for methods that look at each once: memory is that of two."""

from collections.abc import Callable, Iterator, Sequence
from typing import overload

from torch import Tensor


class OneByOne(Sequence[Tensor]):
    """Slices of many models. The first has a buffer of its own, all others share one: each is there until the next."""

    def __init__(self, read: Callable[[int], Tensor], places: range) -> None:
        self._read = read
        self._places = places
        self._first: Tensor | None = None

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> "OneByOne": ...
    def __getitem__(self, index: int | slice) -> "Tensor | OneByOne":
        if isinstance(index, slice):
            return OneByOne(self.__getitem__, range(*index.indices(len(self))))
        place = self._places[index]
        if place != 0:
            return self._read(place)
        self._first = self._read(0) if self._first is None else self._first
        return self._first

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))
