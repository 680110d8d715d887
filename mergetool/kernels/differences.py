"""What two tensors have to do with each other, in sums that can be added up slice by slice, in float64.

relative    |b - a| / |a|                     cosine      a.b / (|a| |b|)
with a base c: the same of the task vectors a - c and b - c, and where their signs disagree
"""

import math
from dataclasses import astuple, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sums:
    """Of two slices, or of many; squares and products of entries, and counts."""

    entries: int = 0
    changed: int = 0
    """Entries that are not equal."""
    broken: int = 0
    """Entries that are not finite in one of them; they are in no sum."""
    a2: float = 0.0
    b2: float = 0.0
    ab: float = 0.0
    off2: float = 0.0
    """Of b - a."""
    largest: float = 0.0
    """The largest |b - a|."""
    base2: float = 0.0
    da2: float = 0.0
    """Of the task vector of a."""
    db2: float = 0.0
    dadb: float = 0.0
    opposed: int = 0
    """Entries that the two task vectors move in opposite directions."""

    def __add__(self, other: "Sums") -> "Sums":
        added = [one + two for one, two in zip(astuple(self), astuple(other), strict=True)]
        added[_LARGEST] = max(self.largest, other.largest)
        return Sums(*added)

    @property
    def relative(self) -> float:
        """What the second is off the first, relative to the first."""
        return ratio(self.off2, self.a2)

    @property
    def cosine(self) -> float:
        return cosine(self.ab, self.a2, self.b2)


_LARGEST = tuple(Sums.__dataclass_fields__).index("largest")


def sums(a: Tensor, b: Tensor, base: Tensor | None = None) -> Sums:
    """Of slices of one shape, as they are stored."""
    differs = a.double() != b.double()
    a, b = a.double(), b.double()
    differs &= ~(torch.isnan(a) & torch.isnan(b))
    sound = torch.isfinite(a) & torch.isfinite(b)
    broken = sound.numel() - int(sound.sum())
    lost = bool((differs & ~sound).any())
    if broken:
        a, b = a.masked_fill(~sound, 0.0), b.masked_fill(~sound, 0.0)
    off = (b - a).flatten()
    return Sums(
        off.numel(),
        int(differs.sum()),
        broken,
        _product(a, a),
        _product(b, b),
        _product(a, b),
        _product(off, off),
        math.inf if lost else float(off.abs().max()) if off.numel() else 0.0,
        *(() if base is None else _of_changes(a, b, base.double(), sound)),
    )


def _of_changes(a: Tensor, b: Tensor, base: Tensor, sound: Tensor) -> tuple[float, float, float, float, int]:
    base = base.masked_fill(~(sound & torch.isfinite(base)), 0.0)
    da, db = a - base, b - base
    return _product(base, base), _product(da, da), _product(db, db), _product(da, db), int((da * db < 0).sum())


def _product(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()))


def ratio(part2: float, whole2: float) -> float:
    """The ratio of two norms, given their squares."""
    return math.sqrt(part2 / whole2) if whole2 else math.inf if part2 else 0.0


def cosine(product: float, a2: float, b2: float) -> float:
    """Of two vectors, at most 1 in size; NaN where one has no direction."""
    return max(-1.0, min(1.0, product / math.sqrt(a2 * b2))) if a2 and b2 else math.nan
