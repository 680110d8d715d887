"""Methods that weigh models by what was measured on them: what they share."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from mergetool.methods.base import Field, Params, PerModel, Positive, Stats, TensorGroup, TensorMethod

if TYPE_CHECKING:
    from torch import Tensor


class Mean(TensorMethod):
    """The weighted average."""

    weight: PerModel[Positive] = 1.0
    needs_base: ClassVar = "unused"
    granularity: ClassVar = "element"
    buffers: ClassVar = 0

    def treatment(self, name: str, shape: tuple[int, ...]) -> str:
        return "average"

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        return mean(group.models, p.weight)


class MeasuredMethod(TensorMethod):
    """A method that needs a statistic of every model, and averages tensors of which there is none."""

    weight: PerModel[Positive] = Field(1.0, description="factor on each model's share")
    needs_base: ClassVar = "unused"

    def problem(self, p: Params) -> str | None:
        return None if any(p.weight) else "all weights are 0, so there is no average"

    def needs_weights(self) -> str | None:
        return "it runs whole models on data"

    def unmeasured(self) -> TensorMethod:
        return Mean(weight=self.weight)


def mean(models: "Sequence[Tensor]", weights: Sequence[float]) -> "Tensor":
    """The weighted average, in the first one's buffer."""
    total = sum(weights)
    out = models[0].mul_(weights[0] / total)
    for weight, model in zip(weights[1:], models[1:], strict=True):
        out.add_(model, alpha=weight / total)
    return out


def numbers(group: TensorGroup) -> list[float]:
    """What was measured of each model, where that is one number."""
    import torch

    assert group.measured is not None
    each = [group.measured.of(place).reshape(()).clone() for place in range(len(group.models))]
    found: list[float] = torch.stack(each).tolist()  # a device is waited for once
    return found
