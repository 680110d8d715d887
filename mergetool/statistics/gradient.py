"""Where the loss falls: its gradient at a model, and squares of the gradients of batches.

The loss is minus the log-likelihood of what is given: the class of a row, or in language models the tokens that come
next. `gradient` is the mean over rows; `gradient-squares` the mean over batches of `batch` rows, in order, of the
squares of each batch's mean gradient, which also holds how far batches differ.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mergetool.errors import PlanError
from mergetool.statistics.base import Extent, Found, Statistic, Tell
from mergetool.statistics.likelihood import check_finite, check_head, gradients, speaks_of
from mergetool.tensors.header import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from mergetool.networks.running import RunningNetwork
    from mergetool.statistics.examples import Example


class _OfLoss(Statistic):
    """What both statistics share."""

    cost: ClassVar = 6.0
    copies: ClassVar = 4.0

    def labelled(self, config: Mapping[str, Any]) -> bool:
        return speaks_of(config) == "classes"

    def form(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], where: str) -> Extent:
        check_head(config, "given", where)
        if speaks_of(config) == "classes" and len(config.get("id2label") or "ab") == 1:
            raise PlanError("it says a value, not a class, and rows give classes", where, "give classifiers")
        return Extent({name: spec.shape for name, spec in specs.items() if spec.dtype.is_float})


@dataclass(frozen=True)
class LossGradient(_OfLoss):
    """The mean over rows of the gradient of the loss."""

    name: ClassVar = "gradient"

    def measure(
        self, network: "RunningNetwork", examples: "Sequence[Example]", names: Collection[str], seed: int, tell: Tell
    ) -> Found:
        total = _of_batch(network, examples, seed, tell)
        return _found(network, total, names)


@dataclass(frozen=True)
class GradientSquares(_OfLoss):
    """The mean over batches of the squares of the gradient of the loss."""

    batch: int = 8
    name: ClassVar = "gradient-squares"

    def measure(
        self, network: "RunningNetwork", examples: "Sequence[Example]", names: Collection[str], seed: int, tell: Tell
    ) -> Found:
        import torch

        starts = range(0, len(examples), max(1, self.batch))
        sums = {name: torch.zeros_like(value) for name, value in network.parameters().items()}
        for start in starts:
            for name, each in _of_batch(network, examples[start : start + self.batch], seed, tell).items():
                sums[name].addcmul_(each, each, value=1 / len(starts))
        return _found(network, sums, names)


def _of_batch(network: "RunningNetwork", examples: "Sequence[Example]", seed: int, tell: Tell) -> "dict[str, Tensor]":
    """The gradient of the mean loss of some rows."""
    import torch

    total = {name: torch.zeros_like(value) for name, value in network.parameters().items()}
    for parts in gradients(network, examples, "given", seed):
        for share, each in parts:
            for known, gradient in zip(total.values(), each, strict=True):
                if gradient is not None:
                    known.add_(gradient, alpha=-share / len(examples))
        tell(1)
    return total


def _found(network: "RunningNetwork", values: "dict[str, Tensor]", names: Collection[str]) -> Found:
    stored = network.stored({name: value.cpu() for name, value in values.items()})
    check_finite(stored, "gradient", network.where)
    return Found({name: stored[name] for name in names if name in stored})
