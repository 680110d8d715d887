"""The way down: the gradient of a model's loss on data, and how much it differs from batch to batch.

The loss of a row is the cross-entropy of its class; of a language model, the mean over its tokens of that of the next
one. Beside the mean over rows, kept under the name of each weight, stands the mean over batches of the squared gradient
of a batch, which tells what Adam divides by.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mergetool.errors import MergeError, PlanError
from mergetool.statistics.base import Extent, Found, Statistic, Tell, tensor_of
from mergetool.statistics.fisher import sparse_embeddings, speaks_of
from mergetool.statistics.gram import not_finite
from mergetool.tensors.header import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from mergetool.networks.running import RunningNetwork
    from mergetool.networks.ways import WayBack
    from mergetool.statistics.examples import Example

SQUARED = "(squared)"
"""What is put before a weight's name for its squares."""


@dataclass(frozen=True)
class LossGradient(Statistic):
    """Mean gradient of the loss, and mean over batches of its square."""

    batch: int = 8
    name: ClassVar = "gradient"
    cost: ClassVar = 6.0
    copies: ClassVar = 4.5
    sums: ClassVar = 3.0
    by_layer: ClassVar = True

    def labelled(self, config: Mapping[str, Any]) -> bool:
        return speaks_of(config) == "classes"

    def form(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], where: str) -> Extent:
        if speaks_of(config) not in ("classes", "next"):
            kind = (config.get("architectures") or ["no class"])[0]
            what = f"its config.json names {kind}, whose loss is not known here"
            raise PlanError(what, where, "give ...ForSequenceClassification, ...ForCausalLM or ...LMHeadModel")
        shapes = {name: spec.shape for name, spec in specs.items() if spec.dtype.is_float}
        return Extent(shapes | {f"{SQUARED}{name}": shape for name, shape in shapes.items()})

    def measure(
        self, network: "RunningNetwork", examples: "Sequence[Example]", names: Collection[str], seed: int, tell: Tell
    ) -> Found:
        def parts(number: int, answer: Any) -> "list[tuple[float, Tensor]]":
            return [(1.0, loss_in(answer.logits[0], examples[number], network.where))]

        found = Found(network.keeping())
        with sparse_embeddings(network.model):
            for way in network.ways_back([tensor_of([each], network.device) for each in examples], parts):
                sums = self._sums(way, len(examples), tell)
                for before, values in sums.items():
                    held = {name: value.cpu() for name, value in values.items()}
                    stored = {f"{before}{name}": value for name, value in network.stored(held).items()}
                    _check_finite(stored, network.where)
                    found.tensors.update((name, value) for name, value in stored.items() if name in names)
                    del held, stored
                del sums, values  # before the next layer is read
        return found

    def _sums(self, way: "WayBack", count: int, tell: Tell) -> "dict[str, dict[str, Tensor]]":
        """The mean gradient, and the mean over batches of the squares, of the parameters of one way."""
        import torch

        mean, squares, own = (
            {name: torch.zeros_like(value, requires_grad=False) for name, value in way.parameters.items()}
            for _ in range(3)
        )
        starts = range(0, count, self.batch)

        def take(_: float, name: str, gradient: "Tensor") -> None:
            own[name].add_(gradient, alpha=1 / len(batch))

        for batch in (range(start, min(start + self.batch, count)) for start in starts):
            for number in batch:
                way.run(number, take)
                tell(way.share(1))
            for name, each in own.items():
                mean[name].add_(each, alpha=len(batch) / count)
                squares[name].addcmul_(each, each, value=1 / len(starts))
                each.zero_()
        return {"": mean, SQUARED: squares}


def losses(network: "RunningNetwork", examples: "Sequence[Example]") -> "list[float]":
    """The loss of every example by itself."""
    import torch

    with torch.no_grad():
        return [float(loss_of(network, example)) for example in examples]


def loss_of(network: "RunningNetwork", example: "Example") -> "Tensor":
    """The loss of one example. Raises MergeError where what the network says is no number."""
    logits = network.model(**tensor_of([example], network.device)).logits[0]
    return loss_in(logits, example, network.where)


def loss_in(logits: "Tensor", example: "Example", where: str) -> "Tensor":
    """The loss of an example, by what a network says of it. Raises MergeError where that is no number."""
    import torch
    from torch.nn.functional import cross_entropy

    if not bool(logits.isfinite().all()):
        raise not_finite("what it says", [example], where)
    if example.label is not None:
        return cross_entropy(logits, torch.tensor(example.label, device=logits.device))
    ids = torch.tensor(example.inputs["input_ids"], device=logits.device)
    return cross_entropy(logits[:-1], ids[1:]) if len(ids) > 1 else logits.sum() * 0


def _check_finite(values: "Mapping[str, Tensor]", where: str) -> None:
    for name, value in values.items():
        if not bool(value.isfinite().all()):
            fix = "repair that model (mergetool verify FOLDER scans it)"
            raise MergeError(f"the gradient of the loss at {name} is not finite", where, fix)
