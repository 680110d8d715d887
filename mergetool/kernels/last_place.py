"""How far apart two tensors are, in units of what their storage can tell apart.

A number that is stored is rounded to the nearest one that its dtype has, so it is off by half a unit in the last place
at most. What was computed in another order is off by the noise of float32 besides; what was computed in the narrow
dtype itself was rounded several times on its way.

Reference: IEEE 754-2019, section 4.3.1; the unit in the last place is that of J.-M. Muller (2005), inria-00070503.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SEVERAL = 4
"""Units in the last place that roundings on the way, in a narrow dtype, may add up to."""


@dataclass(frozen=True)
class Distance:
    """What becomes of a slice when it is compared."""

    other: int = 0
    """Entries that are not what rounding gives, bit for bit."""
    beyond: int = 0
    """Entries that one rounding and noise do not explain."""
    far: int = 0
    """Entries that several roundings do not explain."""
    worst: float = 0.0
    """The largest difference of an entry that is beyond one rounding."""
    units: float = 0.0
    """The same difference, in units of the last place there."""
    place: int = 0
    """Where it is, as a flat index."""


def last_place(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit in the last place of `dtype` at numbers of these sizes (none of them negative)."""
    kind = torch.finfo(dtype)
    exponents = torch.frexp(sizes.clamp(min=kind.smallest_normal)).exponent
    return torch.ldexp(torch.full_like(sizes, kind.eps), exponents - 1)


def is_rounded(expected: Tensor, found: Tensor, wanted: torch.dtype) -> Tensor:
    """Where `found` is exactly what storing `expected` gives: in its own dtype, or in `wanted` before."""
    stored = expected.to(found.dtype)
    same = stored == found
    if not bool(same.all()):
        same |= expected.to(wanted).to(found.dtype) == found
        same |= torch.isnan(stored) & torch.isnan(found)
    return same


def coarser(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """The dtype that tells fewer numbers apart."""
    return one if torch.finfo(one).eps >= torch.finfo(other).eps else other


def distance(expected: Tensor, found: Tensor, wanted: torch.dtype, noise: float) -> Distance:
    """Compare a slice with the numbers it should hold, computed without rounding; both flat.

    `wanted` is the dtype that it should have been stored in, `noise` what arithmetic adds, relative to the slice.
    """
    same = is_rounded(expected, found, wanted)
    if bool(same.all()):
        return Distance()
    other = int((~same).sum())
    values = found.to(expected.dtype)
    apart = (values - expected).abs_().masked_fill_(same, 0.0).nan_to_num_(nan=torch.inf, posinf=torch.inf)
    typical = expected.square().mean().sqrt().nan_to_num(0.0, 0.0, 0.0)
    sizes = torch.maximum(expected.abs(), values.abs()).nan_to_num_(0.0, 0.0, 0.0)
    dtype = coarser(found.dtype, wanted)
    least = torch.finfo(dtype).eps / 4  # half a unit in the last place is more than that, relative to the number
    doubtful = (apart > sizes * least + noise * torch.maximum(sizes, typical)).nonzero().flatten()
    return Distance(other) if len(doubtful) == 0 else _judged(other, apart, sizes, typical, doubtful, dtype, noise)


def _judged(
    other: int, apart: Tensor, sizes: Tensor, typical: Tensor, doubtful: Tensor, dtype: torch.dtype, noise: float
) -> Distance:
    """The same for entries that a quick look does not explain."""
    apart, sizes = apart[doubtful], sizes[doubtful]
    units, wide = last_place(sizes, dtype), torch.maximum(sizes, typical)
    beyond = apart > units / 2 + noise * wide
    far = beyond & (apart > SEVERAL * last_place(wide, dtype))
    judged = apart.masked_fill(~beyond, 0.0)
    place = int(judged.argmax())
    worst, unit = float(judged[place]), float(units[place])
    return Distance(other, int(beyond.sum()), int(far.sum()), worst, worst / unit, int(doubtful[place]))
