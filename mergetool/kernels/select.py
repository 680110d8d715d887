"""The k-th largest magnitude, exactly, by counting: no sort, no copy, any slicing.

Read as an integer, the bits of a non-negative float are ordered as the float is. So a histogram of the top 16 bits of
|x| says in which bin the k-th largest lies, and a second pass over that bin alone, by the next 16 bits, pins it down
(float64 takes four passes). Histograms of slices, tensors or machines add up, exactly.
"""

from dataclasses import dataclass

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

    def count(self, magnitudes: Tensor) -> Tensor:
        """Histogram (65536, int64) of this pass's digit over a slice of |x|."""
        words = magnitudes.reshape(-1).view(torch.int32 if self.bits == 32 else torch.int64)
        if self.shift == self.bits - _DIGIT:
            digits = words >> self.shift
        else:
            digits = words[(words >> (self.shift + _DIGIT)) == self.prefix] >> self.shift
            digits.bitwise_and_(_BINS - 1)
        return torch.bincount(digits, minlength=_BINS)

    def narrow(self, histogram: Tensor) -> "Search | Found":
        """The next pass, or the result, from the summed histogram."""
        larger = histogram.flip(0).cumsum(0)  # larger[j]: how many lie in the j + 1 highest bins
        place = int(torch.searchsorted(larger, self.rank - self.above))
        digit = _BINS - 1 - place
        above = self.above + (int(larger[place - 1]) if place else 0)
        prefix = (self.prefix << _DIGIT) | digit
        if self.shift:
            return Search(self.rank, self.bits, self.shift - _DIGIT, prefix, above)
        word = torch.tensor([prefix], dtype=torch.int32 if self.bits == 32 else torch.int64)
        value = float(word.view(torch.float32 if self.bits == 32 else torch.float64))
        return Found(value, above, int(histogram[digit]))


@dataclass(frozen=True)
class Found:
    """The magnitude searched for, how many are larger, and how many are equal to it."""

    magnitude: float
    above: int
    equal: int
