"""The k-th largest magnitude, exactly, by counting: no sort, no copy, any slicing.

Read as an integer, the bits of a non-negative float are ordered as the float is. So a histogram of the top 15 bits of
|x| says in which bin the k-th largest lies, and a second pass over that bin alone, by the other 16 bits, pins it down
(float64 takes four passes). Histograms of slices, tensors or machines add up, exactly.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_DIGIT = 16
_BINS = 1 << _DIGIT


@dataclass(frozen=True)
class Search:
    """The search for the `rank`-th largest magnitude (1 is the largest) of one vector, `shift` bits from its end.

    Magnitudes whose bits above `shift + 16` equal `prefix` are still in question; `above` others are larger.
    """

    rank: int
    bits: int
    """32 for float32, 64 for float64."""
    shift: int
    prefix: int = 0
    above: int = 0

    @classmethod
    def begin(cls, rank: int, bits: int) -> "Search":
        """Search from the top bits; `bits` is 32 or 64, the width of the floats."""
        return cls(rank, bits, bits - _DIGIT)

    @property
    def is_first(self) -> bool:
        return self.shift == self.bits - _DIGIT

    @property
    def num_bins(self) -> int:
        return _BINS // 2 if self.is_first else _BINS  # no magnitude has a sign bit

    def digits(self, magnitudes: Tensor) -> Tensor:
        """The integers whose histogram this pass wants, from a slice of |x| (1-D)."""
        words = magnitudes.view(torch.int32 if self.bits == 32 else torch.int64)
        if self.is_first:
            return words >> self.shift
        low = self.prefix << (self.shift + _DIGIT)
        return (_between(words, low, low + (_BINS << self.shift)) - low) >> self.shift

    def narrow(self, histogram: Tensor) -> "Search | Found":
        """The next pass, or the result, from the summed histogram."""
        larger = histogram.flip(0).cumsum(0)  # larger[j]: how many lie in the j + 1 highest bins
        place = int(torch.searchsorted(larger, self.rank - self.above))
        digit = len(histogram) - 1 - place
        above = self.above + (int(larger[place - 1]) if place else 0)
        prefix = (self.prefix << _DIGIT) | digit
        if self.shift:
            return Search(self.rank, self.bits, self.shift - _DIGIT, prefix, above)
        word = torch.tensor([prefix], dtype=torch.int32 if self.bits == 32 else torch.int64)
        value = float(word.view(torch.float32 if self.bits == 32 else torch.float64))
        return Found(value, above, int(histogram[digit]))


class Count:
    """The histogram of one pass over one vector, slice by slice."""

    def __init__(self, search: Search) -> None:
        self._search = search
        self._total = torch.zeros(search.num_bins, dtype=torch.int64)
        self._kept: list[Tensor] = []

    def add(self, magnitudes: Tensor) -> None:
        """Count a slice of |x| (1-D)."""
        digits = self._search.digits(magnitudes)
        if self._search.is_first:
            self._total += torch.bincount(digits, minlength=len(self._total)).to("cpu")
        else:
            self._kept.append(digits)  # few are left in question: one histogram at the end

    def histogram(self) -> Tensor:
        """Counts (num_bins,), int64, on the CPU."""
        if self._kept:
            self._total += torch.bincount(torch.cat(self._kept), minlength=len(self._total)).to("cpu")
            self._kept.clear()
        return self._total


@dataclass(frozen=True)
class Found:
    """The magnitude searched for, how many are larger, and how many are equal to it."""

    magnitude: float
    above: int
    equal: int


def places_of(x: Tensor, magnitude: float) -> Tensor:
    """Flat indices (int64, ascending) of the entries with |x| equal to `magnitude`."""
    if x.device.type != "cpu":
        return (x.abs() == magnitude).nonzero().view(-1)
    array, value = x.numpy(), x.numpy().dtype.type(magnitude)  # numpy is several times as fast as torch here
    return torch.from_numpy(np.flatnonzero((array == value) | (array == -value)))


def _between(words: Tensor, low: int, high: int) -> Tensor:
    """The entries in [low, high). On a CPU numpy compacts several times as fast as torch."""
    if words.device.type != "cpu":
        return words[(words >= low) & (words < high)]
    array = words.numpy()
    return torch.from_numpy(array[(array >= low) & (array < high)])
