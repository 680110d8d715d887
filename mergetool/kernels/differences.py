"""What two tensors have to do with each other, in sums that can be added up slice by slice, in float64.

relative    |b - a| / |a|                     cosine      a.b / (|a| |b|)
with a base c: the same of the task vectors a - c and b - c, and where their signs disagree
"""

import math
from dataclasses import astuple, dataclass, replace

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
    """Of flat slices of one length, in float64; `b` may be `a` itself, where the two are known to be one."""
    a2 = _product(a, a)
    if b is a and math.isfinite(a2):
        same = Sums(len(a), a2=a2, b2=a2, ab=a2)
        return same if base is None else _with_changes(same, a, a, base)
    b2 = _product(b, b)
    if not math.isfinite(a2 + b2):
        return _unsound(a, b, base)
    off = b - a
    low, high = torch.aminmax(off) if len(off) else (off.sum(), off.sum())
    largest = max(-float(low), float(high))
    summed = Sums(len(a), int(off.count_nonzero()), 0, a2, b2, _product(a, b), _product(off, off), largest)
    return summed if base is None else _with_changes(summed, a, b, base)


def _with_changes(summed: Sums, a: Tensor, b: Tensor, base: Tensor) -> Sums:
    da, db = a - base, b - base
    da2, db2, dadb = _product(da, da), _product(db, db), _product(da, db)
    opposed = int((da * db < 0).sum())
    return replace(summed, base2=_product(base, base), da2=da2, db2=db2, dadb=dadb, opposed=opposed)


def _unsound(a: Tensor, b: Tensor, base: Tensor | None) -> Sums:
    """Where some numbers are not finite: these are counted, and left out of all sums."""
    differs = (a != b) & ~(torch.isnan(a) & torch.isnan(b))
    sound = torch.isfinite(a) & torch.isfinite(b)
    if base is not None:
        sound &= torch.isfinite(base)
        base = base.masked_fill(~sound, 0.0)
    summed = sums(a.masked_fill(~sound, 0.0), b.masked_fill(~sound, 0.0), base)
    lost = bool((differs & ~sound).any())
    largest = math.inf if lost else summed.largest
    return replace(summed, changed=int(differs.sum()), broken=int((~sound).sum()), largest=largest)


def _product(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a, b))


def ratio(part2: float, whole2: float) -> float:
    """The ratio of two norms, given their squares."""
    return math.sqrt(part2 / whole2) if whole2 else math.inf if part2 else 0.0


def cosine(product: float, a2: float, b2: float) -> float:
    """Of two vectors, at most 1 in size; NaN where one has no direction."""
    return max(-1.0, min(1.0, product / math.sqrt(a2 * b2))) if a2 and b2 else math.nan


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Centred kernel alignment of two tables of features of the same rows, (rows, any number): 0 to 1.

    NaN where the rows of one are all alike. Reference: Kornblith et al., ICML 2019, https://arxiv.org/abs/1905.00414.
    """
    kernels = []
    for table in (first, second):
        centred = table.double() - table.double().mean(dim=0)
        kernels.append(centred @ centred.T)
    one, two = kernels
    return cosine(float((one * two).sum()), float(one.square().sum()), float(two.square().sum()))


def stitched(first: Tensor, second: Tensor, ridge: float = 1e-2) -> float:
    """How much of one table of features an affine map of another one tells, on rows that it was not fitted to.

    Tables of the same rows, (rows, any number). Rows with even numbers tell of the others, and they of them, by least
    squares with `ridge` times the mean of the squared lengths; the share of the variance about the mean of the fitted
    rows: 1 is all, below 0 worse than that mean. NaN where there is nothing to tell. Reference: Bansal et al.,
    Revisiting Model Stitching, NeurIPS 2021, https://arxiv.org/abs/2106.07682 (there the map is trained).
    """
    lost = there = 0.0
    tables = first.double(), second.double()
    for half in (0, 1):
        (x, x_mean), (y, y_mean) = [_centred(table[half::2]) for table in tables]
        new, told = tables[0][1 - half :: 2] - x_mean, tables[1][1 - half :: 2] - y_mean
        kernel = x @ x.mT
        weight = max(ridge * float(kernel.diagonal().mean()), torch.finfo(kernel.dtype).tiny)
        kernel.diagonal().add_(weight)
        lost += float((told - new @ x.mT @ torch.linalg.solve(kernel, y)).square().sum())
        there += float(told.square().sum())
    return 1 - lost / there if there else math.nan


def _centred(table: Tensor) -> tuple[Tensor, Tensor]:
    mean = table.mean(dim=0)
    return table - mean, mean
