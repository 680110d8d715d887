"""The k-th largest magnitude, exactly, by counting: no sort, no copy, any slicing.

Read as an integer, the bits of a non-negative float are ordered as the float is. So a histogram of the top 15 bits of
|x| says in which bin the k-th largest lies, and a second pass over that bin alone, by the other 16 bits, pins it down
(float64 takes four passes). Histograms of slices, tensors or machines add up, exactly.

Counting every entry is most of the cost. Where a vector is large, the histogram of a sample says between which bins the
k-th largest lies, but for bad luck; then one pass that keeps the few entries between them, and counts the larger ones,
finds it just as exactly, and shows bad luck.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_DIGIT = 16
_BINS = 1 << _DIGIT
_DEVIATIONS = 6.0
"""Standard deviations of a sampled rank that a bracket allows for: slices are not quite random samples."""
_LANES = 16
"""Histograms that a device fills side by side: where many entries are equal, they would wait for each other in one."""
_MOST_IN_BRACKET = 1 / 8
"""Share of the entries beyond which keeping those in a bracket is dearer than counting all."""

_FEW = 1 / 32
"""Share of the entries up to which it is worth while to pick those out that a bracket is about."""
_LARGEST = (1 << 31) - 1
"""No number has bits that are larger as a whole number."""


@dataclass(frozen=True)
class RankedMagnitude:
    """The magnitude searched for, how many are larger, and how many are equal to it."""

    magnitude: float
    above: int
    equal: int


@dataclass(frozen=True)
class RankSearch:
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
    def begin(cls, rank: int, bits: int) -> "RankSearch":
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
        return _offsets(words, low, _BINS << self.shift) >> self.shift

    def counted(self, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
        """A digit for every entry of a slice, and whether it counts (1 or 0): nobody must know how many do."""
        words = magnitudes.view(torch.int32 if self.bits == 32 else torch.int64)
        if self.is_first:
            digits = (words >> self.shift) & (self.num_bins - 1)  # whatever bits a NaN has, it is in a bin
            return digits, torch.ones((), dtype=torch.int64, device=words.device).expand(len(words))
        offsets = words - (self.prefix << (self.shift + _DIGIT))
        inside = (offsets >= 0) & (offsets < _BINS << self.shift)
        return (offsets >> self.shift) & (_BINS - 1), inside.long()

    def narrow(self, histogram: Tensor) -> "RankSearch | RankedMagnitude":
        """The next pass, or the result, from the summed histogram.

        A bin holds magnitudes that share all bits read so far. The one that the rank falls into is told from counts
        alone, by adding bins up from the highest; what lies in higher bins is larger for certain and need not be looked
        at again. So every pass leaves one bin in question, and 16 more bits of the answer are known.
        """
        larger = histogram.flip(0).cumsum(0)  # larger[j]: how many lie in the j + 1 highest bins
        place = int(torch.searchsorted(larger, self.rank - self.above))
        digit = len(histogram) - 1 - place
        above = self.above + (int(larger[place - 1]) if place else 0)
        prefix = (self.prefix << _DIGIT) | digit
        if self.shift:  # bits are left to be read; once there are none, all in the bin are one and the same number
            return RankSearch(self.rank, self.bits, self.shift - _DIGIT, prefix, above)
        word = torch.tensor([prefix], dtype=torch.int32 if self.bits == 32 else torch.int64)
        value = float(word.view(torch.float32 if self.bits == 32 else torch.float64))
        return RankedMagnitude(value, above, int(histogram[digit]))


class Count:
    """The histogram of one pass over one vector, slice by slice."""

    def __init__(self, search: RankSearch) -> None:
        self._search = search
        self._total = torch.zeros(search.num_bins, dtype=torch.int64)
        self._kept: list[Tensor] = []

    def add(self, magnitudes: Tensor) -> None:
        """Count a slice of |x| (1-D). On a device the host goes on without waiting for it."""
        if magnitudes.device.type != "cpu":
            digits, counted = self._search.counted(magnitudes)
            if self._total.device != digits.device:
                self._total = self._total.new_zeros(_LANES * self._search.num_bins, device=digits.device)
            lanes = torch.arange(len(digits), dtype=torch.int32, device=digits.device) % _LANES
            self._total.index_add_(0, lanes * self._search.num_bins + digits, counted)
            return
        digits = self._search.digits(magnitudes)
        if self._search.is_first:
            self._total += torch.bincount(digits, minlength=len(self._total))
        else:
            self._kept.append(digits)  # few are left in question: one histogram at the end

    def histogram(self) -> Tensor:
        """Counts (num_bins,), int64, where the slices are."""
        if self._kept:
            self._total += torch.bincount(torch.cat(self._kept), minlength=len(self._total))
            self._kept.clear()
        return self._total.view(-1, self._search.num_bins).sum(0)


@dataclass(frozen=True)
class Bracket:
    """Bits of float32 magnitudes, as integers, between which the `rank`-th largest of a vector probably lies."""

    rank: int
    low: int
    end: int
    share: float = 0.0
    """Of all entries those that are probably between."""
    larger: float = 0.5
    """Of all entries those that are larger than the one that is sought."""

    @classmethod
    def of_all(cls, rank: int) -> "Bracket":
        """Nothing lies outside."""
        return cls(rank, 0, _LARGEST, 1.0)

    @classmethod
    def around(cls, rank: int, total: int, sample: Tensor) -> "Bracket | None":
        """From the first histogram over a sample of `total` magnitudes; None where it would hold too many."""
        larger = sample.flip(0).cumsum(0)
        size, share = int(larger[-1]), rank / total
        margin = 1 + _DEVIATIONS * math.sqrt(share * (1 - share) * size)
        ranks = torch.tensor([share * size - margin, share * size + margin]).clamp(1, size).round().long()
        first, last = torch.searchsorted(larger, ranks).tolist()
        first = first if share * size - margin >= 1 else 0  # what is larger, or smaller, than all of a sample counts
        last = last if share * size + margin <= size else len(sample) - 1
        inside = (int(larger[last]) - (int(larger[first - 1]) if first else 0)) / size
        if inside > _MOST_IN_BRACKET:
            return None
        end = min(len(sample) - first << _DIGIT, _LARGEST)
        return cls(rank, len(sample) - 1 - last << _DIGIT, end, inside, share)

    def settle(self, table: Tensor) -> RankedMagnitude | None:
        """The magnitude searched for, from the tallies of all slices, one below the other; None if it lies outside."""
        values, inverse = torch.unique(table[:, 0], return_inverse=True)
        counts = torch.zeros(len(values), dtype=torch.int64).index_add_(0, inverse, table[:, 1].long())
        larger = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(larger, self.rank))
        if not 0 < place < len(values):
            return None
        value = values[len(values) - 1 - place]
        return RankedMagnitude(
            float(value.view(torch.float32)), int(larger[place - 1]), int(larger[place] - larger[place - 1])
        )


_NONE = torch.empty(0, dtype=torch.int32)


class Tally:
    """What lies in a bracket, and how many are larger, slice by slice."""

    def __init__(self, bracket: Bracket) -> None:
        self._bracket = bracket
        self._larger = 0
        self._kept: list[Tensor] = []
        self._rows: list[Tensor] = []

    def add(self, magnitudes: Tensor) -> None:
        """Look through a slice of |x| (1-D, float32, on the CPU)."""
        words, bracket = magnitudes.view(torch.int32), self._bracket
        if bracket.larger + bracket.share < _FEW:
            words = words[_places(words.numpy() >= bracket.low)]
        elif bracket.larger - bracket.share > 1 - _FEW:
            every, words = len(words), words[_places(words.numpy() < bracket.end)]
            self._larger += every - len(words)
        self._larger += int(np.count_nonzero(words.numpy() >= bracket.end))  # several times as fast as torch
        self._kept.append(_offsets(words, bracket.low, bracket.end - bracket.low))

    @staticmethod
    def add_all(tallies: Sequence["Tally"], magnitudes: Sequence[Tensor]) -> None:
        """Look through a slice for each. On a device the host waits for all of them together."""
        if magnitudes[0].device.type == "cpu":
            for tally, each in zip(tallies, magnitudes, strict=True):
                tally.add(each)
            return
        brackets, words = [tally._bracket for tally in tallies], [each.view(torch.int32) for each in magnitudes]
        larger = [each >= bracket.end for each, bracket in zip(words, brackets, strict=True)]
        inside = torch.stack(
            [(each >= bracket.low) ^ above for each, bracket, above in zip(words, brackets, larger, strict=True)]
        )
        kept = torch.masked_select(torch.stack(words), inside)
        place = torch.arange(len(words), device=kept.device)
        whose = torch.repeat_interleave(place, inside.sum(1), output_size=len(kept))
        distinct, counts = torch.unique(whose << 32 | kept, return_counts=True)
        found = torch.cat((torch.stack(larger).sum(1), distinct, counts)).to("cpu")
        above, distinct, counts = torch.split(found, [len(words), len(distinct), len(counts)])
        rows = torch.stack((distinct & 0xFFFFFFFF, counts), 1).int()
        for index, tally in enumerate(tallies):
            tally._larger += int(above[index])
            tally._rows.append(rows[distinct >> 32 == index])

    def table(self) -> Tensor:
        """Shape (1 + values, 2), int32, on the CPU: a value's bits and how often it comes, in a slice if not in all.

        The first row is for all that are larger, under the bits where the bracket ends.
        """
        values, counts = np.unique(torch.cat([_NONE, *self._kept]).numpy(), return_counts=True)
        rows = np.empty((len(values) + 1, 2), dtype=np.int32)
        rows[0] = self._bracket.end, self._larger
        rows[1:, 0], rows[1:, 1] = values + np.int32(self._bracket.low), counts
        return torch.cat([torch.from_numpy(rows), *self._rows])


def places_of(x: Tensor, magnitude: float) -> Tensor:
    """Flat indices (int64, CPU, ascending) of the entries with |x| equal to `magnitude`."""
    if x.device.type != "cpu":
        return (x.abs() == magnitude).nonzero().view(-1).cpu()
    array, value = x.numpy(), x.numpy().dtype.type(magnitude)  # numpy is several times as fast as torch here
    return torch.from_numpy(np.flatnonzero((array == value) | (array == -value)))


def _places(chosen: "np.ndarray[tuple[int, ...], np.dtype[np.bool_]]") -> Tensor:
    """Where so few entries are chosen that looking for them costs less than a second look at all."""
    return torch.from_numpy(np.flatnonzero(chosen))


def _offsets(words: Tensor, low: int, length: int) -> Tensor:
    """`words - low` of those in [low, low + length), on the CPU: numpy compacts several times as fast as torch."""
    array = words.numpy()
    unsigned = np.subtract(array, low, dtype=array.dtype).view(np.uint32 if words.dtype == torch.int32 else np.uint64)
    return torch.from_numpy(np.compress(unsigned < unsigned.dtype.type(length), unsigned).view(array.dtype))
