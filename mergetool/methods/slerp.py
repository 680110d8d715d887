"""Spherical interpolation between two models.

Each tensor is a vector; the result walks the great circle between the directions of the two, so that their norm is
kept where a straight line would cut through the sphere. `t` is 0 at the first model and 1 at the second; outside, the
walk goes on beyond them. Where the vectors are almost parallel (|cosine| above 0.9995) or one of them is zero there is
no circle to walk and the straight line is taken; most fine-tunes of one base are that close, and each such tensor is
noted in the lock.

Reference: Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985, section 3.3.
Differs from the paper: vectors need not have length 1. As is usual for weights, the coefficients come from the unit
vectors and are applied to the vectors themselves, tensor by tensor.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Field, Finite, Params, Scheduled, StatisticsPass, Stats, TensorGroup, TensorMethod

if TYPE_CHECKING:
    from torch import Tensor

_PARALLEL = 0.9995


@dataclass(frozen=True)
class _Products(StatisticsPass):
    """Inner products of the two vectors: <a,a>, <b,b>, <a,b>, in float64."""

    def observe(self, groups: Iterable[TensorGroup], p: Params) -> "Tensor":
        import torch

        from mergetool.kernels.sums import wide_sum

        total = torch.zeros(3, dtype=torch.float64)
        for group in groups:
            a, b = group.models
            pairs = ((a, a), (b, b), (a, b))
            products = [wide_sum(torch.mul(x, y, out=group.scratch("product")), group.scratch) for x, y in pairs]
            total += torch.stack(products).to("cpu")  # added up here, wherever the slice is
        return total

    def conclude(self, total: "Tensor") -> Stats:
        return {"products": tuple(total.tolist())}


class Slerp(TensorMethod):
    """`sin((1 - t) w) / sin w * a + sin(t w) / sin w * b`, w the angle between a and b"""

    method: Literal["slerp"] = "slerp"
    t: Scheduled[Finite] = Field(0.5, description="0 is the first model, 1 the second; outside, beyond them")
    needs_base: ClassVar = "unused"
    min_models: ClassVar = 2
    max_models: ClassVar = 2
    granularity: ClassVar = "element"
    buffers: ClassVar = 3
    pass_depends_on: ClassVar = ()
    exempt: ClassVar = {"order": "t counts from the first model to the second"}

    @property
    def needs_float64(self) -> bool:
        return True

    def statistics_pass(self, p: Params, num_elements: int, bits: int) -> StatisticsPass | None:
        return _Products()

    def needs_weights(self) -> str | None:
        return "it turns whole weights into one another; `nuslerp` turns task vectors"

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        first, second, note = _coefficients(p.t, *stats["products"])
        if note:
            group.note(note)
        a, b = group.models
        if first == 0.0 or second == 0.0:  # an end of the path, to the bit
            return b if first == 0.0 else a
        return a.mul_(first).add_(b, alpha=second)


def _coefficients(t: float, aa: float, bb: float, ab: float) -> tuple[float, float, str]:
    """(factor on a, factor on b, remark) from the inner products."""
    if t in (0.0, 1.0):
        return 1.0 - t, t, ""
    if aa == 0.0 or bb == 0.0:
        return 1.0 - t, t, "one model's tensor is zero: linear interpolation"
    cosine = ab / math.sqrt(aa) / math.sqrt(bb)
    if abs(cosine) > _PARALLEL:
        kind = "almost parallel" if cosine > 0 else "opposite"
        return 1.0 - t, t, f"{kind} tensors: linear interpolation"
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle), ""
