"""How wrong a model is on rows: the mean of its loss, one number that all its weights share.

Of classifiers the cross-entropy of the class of a row, of language models the mean over its tokens of that of the next.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mergetool.statistics.base import Extent, Found, Statistic, Tell, tensor_of, through
from mergetool.statistics.fisher import speaks_of
from mergetool.statistics.gradient import LossGradient, loss_in
from mergetool.tensors.header import TensorSpec

if TYPE_CHECKING:
    from mergetool.networks.running import RunningNetwork
    from mergetool.statistics.examples import Example


@dataclass(frozen=True)
class MeanLoss(Statistic):
    """The mean loss over rows."""

    name: ClassVar = "loss"
    cost: ClassVar = 1.0
    copies: ClassVar = 2.0
    by_layer: ClassVar = True

    def labelled(self, config: Mapping[str, Any]) -> bool:
        return speaks_of(config) == "classes"

    def form(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], where: str) -> Extent:
        known = LossGradient().form(specs, config, where)
        return Extent({name: () for name in known.shapes if name in specs})

    def measure(
        self, network: "RunningNetwork", examples: "Sequence[Example]", names: Collection[str], seed: int, tell: Tell
    ) -> Found:
        import torch

        found, rows = [], [[each] for each in examples]
        with torch.no_grad():
            for way in network.ways([tensor_of(row, network.device) for row in rows]):
                for example, answer in zip(examples, through(way, rows, tell, lambda _: None), strict=True):
                    if way.is_last:
                        found.append(float(loss_in(answer.logits[0], example, network.where)))
        first, *others = sorted(names)
        mean = torch.tensor(sum(found) / len(found), dtype=torch.float64)
        return Found({first: mean}, dict.fromkeys(others, first))
