"""A point of a Bezier curve through models: the first and the last are its ends, the others bend it.

Networks that training found can be joined by curves along which the loss stays low, where the straight line crosses a
ridge. The control points of such a curve are trained, as models are; this evaluates the curve at `t`. With two models
it is the straight line. `sweep: {t: [0, 0.25, 0.5, 0.75, 1]}` writes several points in one run.

Reference: Garipov et al., Loss surfaces, mode connectivity, and fast ensembling of DNNs, NeurIPS 2018,
https://arxiv.org/abs/1802.10026, section 3.3.
Differs from the paper: any number of control points; they are given, not trained. Batch norms keep what the curve makes
of their statistics: measure them anew on training data.
"""

from math import comb
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Field, Params, Scheduled, Stats, TensorGroup, TensorMethod, Unit

if TYPE_CHECKING:
    from torch import Tensor


class Bezier(TensorMethod):
    """`sum_k C(n, k) (1 - t)^(n - k) t^k x_k` over the models x_0 ... x_n"""

    method: Literal["bezier"] = "bezier"
    t: Scheduled[Unit] = Field(0.5, description="where on the curve: 0 is the first model, 1 the last")
    needs_base: ClassVar = "unused"
    granularity: ClassVar = "element"
    buffers: ClassVar = 0
    min_models: ClassVar = 2
    folds: ClassVar = True
    exempt: ClassVar = {"order": "the first and the last model are the ends, the others control points in order"}

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        last = len(group.names) - 1
        shares = [comb(last, k) * (1.0 - p.t) ** (last - k) * p.t**k for k in range(last + 1)]
        point = group.models[0].mul_(shares[0])
        for share, model in zip(shares[1:], group.models[1:], strict=True):
            point.add_(model, alpha=share)
        return point
