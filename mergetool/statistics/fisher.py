"""How much each parameter matters for what a model says: the diagonal of its Fisher information.

The mean over examples of squared gradients of the log-likelihood, each example's by itself: the square of a sum over a
batch would hold products of different examples. Whose likelihood: of a class drawn from what the model says
(`sampled`), of the class that is given (`given`: for language models, the tokens that come next), or of every class,
weighted by its probability (`exact`; for classifiers).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mergetool.statistics.base import Extent, Found, Statistic, Tell
from mergetool.statistics.likelihood import Labels, check_finite, check_head, gradients, speaks_of
from mergetool.tensors.header import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from mergetool.networks.running import RunningNetwork
    from mergetool.statistics.examples import Example


@dataclass(frozen=True)
class DiagonalFisher(Statistic):
    """The mean over examples of squared gradients."""

    labels: Labels = "sampled"
    name: ClassVar = "fisher"
    cost: ClassVar = 6.0
    copies: ClassVar = 3.0

    @property
    def draws(self) -> bool:
        return self.labels == "sampled"

    def labelled(self, config: Mapping[str, Any]) -> bool:
        return self.labels == "given" and speaks_of(config) == "classes"

    def form(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], where: str) -> Extent:
        check_head(config, self.labels, where)
        return Extent({name: spec.shape for name, spec in specs.items() if spec.dtype.is_float})

    def measure(
        self, network: "RunningNetwork", examples: "Sequence[Example]", names: Collection[str], seed: int, tell: Tell
    ) -> Found:
        import torch

        sums = {name: torch.zeros_like(value) for name, value in network.parameters().items()}
        for parts in gradients(network, examples, self.labels, seed):
            for share, each in parts:
                _add_squares(list(sums.values()), each, share)
            tell(1)
        stored = network.stored({name: value.div_(len(examples)).cpu() for name, value in sums.items()})
        check_finite(stored, "Fisher information", network.where)
        return Found({name: stored[name] for name in names if name in stored})


def _add_squares(sums: "Sequence[Tensor]", gradients: "Sequence[Tensor | None]", share: float) -> None:
    for total, gradient in zip(sums, gradients, strict=True):
        if gradient is None:
            continue
        if gradient.is_sparse:  # an embedding: only rows of tokens that occur
            rows = gradient.coalesce()
            total.index_add_(0, rows.indices()[0], rows.values().square(), alpha=share)
        else:
            total.addcmul_(gradient, gradient, value=share)
