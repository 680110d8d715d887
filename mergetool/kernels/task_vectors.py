"""What one look at a slice of several models tells of their task vectors: sums that are added up over slices.

Of every entry: products of all vectors with each other, how many entries each of them changes, the largest. Of a part
of a slice, which may be all of it, also what costs more: signs, magnitudes, and what a rounding leaves of the mean.

Products are float32 over a slice and float64 over slices; whatever else is counted is exact.

Legend: n models, L entries of a slice; x (n + 1, L) holds the base (or what stands for it), then the task vectors.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]

_PARTS_BITS = 4
"""Each octave of magnitudes has 16 bins."""
_OCTAVES = 64
_LOWEST = 127 - 54
"""Exponent of the first octave, 2^-54, as float32 stores it; what is smaller is counted with it."""
_BINS = _OCTAVES << _PARTS_BITS
_MANTISSA = 23


@dataclass
class Drawn:
    """What is counted in the part of the entries that is looked at more closely."""

    entries: int
    agreement: Array
    """(n, n): entries that two move the same way, less those that they move in opposite ways."""
    moved: Array
    """(n, n): entries that both move."""
    conflicts: int
    """Entries that some move up and others down."""
    mass: Array
    """(n,): sums of magnitudes."""
    mass_of_sum: float
    """Of the magnitudes of the sum of all."""
    magnitudes: Array
    """(n, bins): how many entries have which magnitude; see `energy_in_largest`."""
    mean2: float
    """Squared norm of the mean task vector."""
    lost2: float
    """Squared norm of what rounding takes from base + mean."""
    touched: int
    """Entries in which base + mean differs from the base."""
    survived: int
    """Entries in which the two still differ once both are rounded."""

    def __add__(self, other: Self) -> Self:
        return type(self)(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})

    @classmethod
    def nothing(cls, n: int) -> Self:
        """Where no entry was looked at."""
        counts = np.zeros((n, _BINS), np.int64)
        return cls(0, np.zeros((n, n)), np.zeros((n, n)), 0, np.zeros(n), 0.0, counts, 0.0, 0.0, 0, 0)

    def __mul__(self, factor: float) -> Self:
        return type(self)(**{each.name: getattr(self, each.name) * factor for each in fields(self)})


@dataclass
class SliceSums:
    """All sums of some slices."""

    entries: int
    gram: Array
    """(n + 1, n + 1) of x."""
    changed: Array
    """(n,): entries that are not zero."""
    largest: Array
    """(n,): largest magnitudes."""
    broken: Array
    """(n + 1,): entries that are not finite; they are in no other sum."""
    drawn: Drawn

    def __add__(self, other: "SliceSums") -> "SliceSums":
        return SliceSums(
            self.entries + other.entries,
            self.gram + other.gram,
            self.changed + other.changed,
            np.maximum(self.largest, other.largest),
            self.broken + other.broken,
            self.drawn + other.drawn,
        )

    def in_full(self) -> "SliceSums":
        """With what was counted in a part of the entries as it would be in all of them, for adding up tensors."""
        return replace(self, drawn=self.drawn * (self.entries / max(1, self.drawn.entries)))


def tally(x: Tensor, drawn: int) -> SliceSums:
    """The sums of a slice, of which the first `drawn` entries are looked at more closely."""
    gram = (x @ x.mT).double().numpy()
    broken = np.zeros(len(x), np.int64)
    if not x.shape[1]:
        n = len(x) - 1
        return SliceSums(0, gram, np.zeros(n, np.int64), np.zeros(n), broken, Drawn.nothing(n))
    if not np.isfinite(gram).all():
        x, broken = _sound(x)
        wide = x.double()  # float32 has no room for squares of what is above 1e19
        gram = (wide @ wide.mT).numpy()
    changes = x[1:]
    nonzero = (changes != 0).numpy()
    changed = np.array([np.count_nonzero(row) for row in nonzero], np.int64)
    largest = torch.maximum(changes.amax(1), -changes.amin(1)).double().numpy()
    looked = _drawn(x[:, :drawn].contiguous()) if drawn else Drawn.nothing(len(changes))
    return SliceSums(x.shape[1], gram, changed, largest, broken, looked)


def _sound(x: Tensor) -> tuple[Tensor, Array]:
    """x with zeros where any vector is not finite, and how often each is not."""
    finite = torch.isfinite(x)
    return x.masked_fill(~finite.all(0), 0.0), (~finite).sum(1).numpy()


def _drawn(x: Tensor) -> Drawn:
    changes = x[1:]
    signs = torch.sign(changes)
    mean = changes.mean(0)
    merged = x[0] + mean
    kept = merged.bfloat16()
    return Drawn(
        x.shape[1],
        (signs @ signs.mT).double().numpy(),
        (signs.abs() @ signs.abs().mT).double().numpy(),
        int(((signs.amax(0) > 0) & (signs.amin(0) < 0)).sum()),
        changes.abs().sum(1, dtype=torch.float64).numpy(),
        float(changes.sum(0).abs().sum(dtype=torch.float64)),
        _magnitudes(changes),
        float(mean.square().sum(dtype=torch.float64)),
        float((kept - merged).square().sum(dtype=torch.float64)),
        int((merged != x[0]).sum()),
        int((kept != x[0].bfloat16()).sum()),
    )


def _magnitudes(changes: Tensor) -> Array:
    """How many entries of each row fall into each bin; zeros into none."""
    bits = changes.float().contiguous().view(torch.int32) & 0x7FFFFFFF
    places = (bits >> (_MANTISSA - _PARTS_BITS)) - (_LOWEST << _PARTS_BITS)
    places = places.clamp_(0, _BINS - 1) + torch.arange(len(bits), dtype=torch.int32)[:, None] * _BINS
    counts = torch.bincount(places.view(-1), minlength=len(bits) * _BINS).view(-1, _BINS).numpy()
    counts[:, 0] -= (bits == 0).sum(1).numpy()
    return counts


def _sizes() -> Array:
    """The middle of every bin."""
    octave, part = np.divmod(np.arange(_BINS), 1 << _PARTS_BITS)
    return np.exp2(octave + _LOWEST - 127.0) * (1 + (part + 0.5) / (1 << _PARTS_BITS))


def energy_in_largest(magnitudes: Array, entries: int, density: float, power: int = 2) -> float:
    """The share of the sum of |t|^power that the largest `density` of all entries hold, to about 1 %.

    NaN for a task vector of zeros.
    """
    return float(energies_in_largest(magnitudes, entries, np.array(density), power))


def energies_in_largest(magnitudes: Array, entries: int, densities: Array, power: int = 2) -> Array:
    """The same for several densities."""
    counts, shares = _falling(magnitudes, power)
    found: Array = np.interp(densities * entries, counts, shares) * (1.0 if shares[-1] else math.nan)
    return found


def density_of_energy(magnitudes: Array, entries: int, share: float) -> float:
    """The smallest density whose largest entries hold this share of the squared norm."""
    counts, shares = _falling(magnitudes, 2)
    return float(np.interp(share, shares, counts)) / max(1, entries) if shares[-1] else math.nan


def _falling(magnitudes: Array, power: int) -> tuple[Array, Array]:
    """How many entries are at least so large, and their share of the sum, from the largest on."""
    counts = magnitudes[::-1].astype(np.float64)
    sums = (counts * _sizes()[::-1] ** power).cumsum()
    whole = sums[-1] or 1.0
    return np.concatenate([[0.0], counts.cumsum()]), np.concatenate([[0.0], sums / whole])
