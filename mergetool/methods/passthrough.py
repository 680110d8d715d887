"""Copy one model, optionally scaled.

The carrier for recipes that only change storage: another dtype, other shards, tensors taken from elsewhere by
overrides with `use`, or a factor on some tensors.

Reference: none; the identity.
Differs from the paper: nothing.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Factored, Field, Finite, Params, Scheduled, Stats, TensorGroup, TensorMethod

if TYPE_CHECKING:
    from torch import Tensor


class Passthrough(TensorMethod):
    """`scale * x`"""

    method: Literal["passthrough"] = "passthrough"
    scale: Scheduled[Finite] = Field(1.0, description="factor on every value")
    needs_base: ClassVar = "unused"
    max_models: ClassVar = 1
    granularity: ClassVar = "element"
    buffers: ClassVar = 0

    def in_factors(self, name: str, shape: tuple[int, ...]) -> Factored:
        return "sum"

    def coefficients(self, p: Params) -> tuple[float, ...]:
        return (float(p.scale),)

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        (model,) = group.models
        return model if p.scale == 1.0 else model.mul_(p.scale)
