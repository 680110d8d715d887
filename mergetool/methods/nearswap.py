"""Take over what is almost the same already, and move everything else only a little.

Where a model differs from the base by less than a limit, its value is taken; where it differs by more, the base's value
moves towards it by just the limit. So a base is touched with another model without being overruled anywhere. The limit
is `t` times the mean change of the tensor, or `t` itself.

Reference: alchemonaut, NearSwap, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001.
Differs from the paper: there the limit is absolute (`limit: absolute`), which suits one pair of models: fine-tunes
differ in how far they went, and so do layers.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Field, Params, Positive, Scheduled, StatisticsPass, Stats, TensorGroup, TensorMethod

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _MeanChange(StatisticsPass):
    """Mean magnitude of a task vector, in float64."""

    num_elements: int

    def observe(self, groups: Iterable[TensorGroup], p: Params) -> "Tensor":
        import torch

        from mergetool.kernels.sums import wide_sum

        total = torch.zeros(1, dtype=torch.float64)
        for group in groups:
            total += wide_sum(group.deltas[0].abs_(), group.scratch).to("cpu")
        return total

    def conclude(self, total: "Tensor") -> Stats:
        return {"change": (float(total) / max(1, self.num_elements),)}


class Nearswap(TensorMethod):
    """`base + clamp(x - base, -limit, limit)`"""

    method: Literal["nearswap"] = "nearswap"
    t: Scheduled[Positive] = Field(1.0, description="how far a value may move")
    limit: Literal["relative", "absolute"] = Field(
        "relative", description="whether `t` counts in mean changes of the tensor, or as it is"
    )
    needs_base: ClassVar = "required"
    max_models: ClassVar = 1
    granularity: ClassVar = "element"
    buffers: ClassVar = 3
    pass_depends_on: ClassVar = ()
    neutral: ClassVar = {"t": 1e6}
    exempt: ClassVar = {"units limit=absolute": "the limit has a size of its own"}

    @property
    def needs_float64(self) -> bool:
        return self.limit == "relative"

    def statistics_pass(self, p: Params, num_elements: int, bits: int) -> StatisticsPass | None:
        return _MeanChange(num_elements) if self.limit == "relative" else None

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        import torch

        limit = p.t * stats["change"][0] if self.limit == "relative" else p.t
        (delta,) = group.deltas
        moved = torch.clamp(delta, -limit, limit, out=group.scratch("moved"))
        assert group.base is not None
        return group.base.add_(moved).add_(delta, alpha=0.0)  # what is not finite must not become a limit
