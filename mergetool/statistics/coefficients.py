"""How much of each task vector the merged model should hold, learnt on rows of every task: AdaMerging.

The loss is the sum over tasks of what the merged model, under the head of that task's model, makes of its rows: the
entropy of its answers, which needs no labels, or the cross-entropy of what is given. Its gradient by a coefficient is
the inner product of the gradient by a weight with the task vector, so only as much is kept as one gradient takes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mergetool.errors import PlanError
from mergetool.statistics.base import Extent, Found, JointStatistic, Merger, Tell, tensor_of
from mergetool.statistics.fisher import speaks_of
from mergetool.statistics.gram import not_finite
from mergetool.tensors.header import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from mergetool.networks.running import RunningNetwork
    from mergetool.statistics.examples import Example

Loss = Literal["entropy", "cross-entropy"]
Per = Literal["tensor", "model"]


@dataclass(frozen=True)
class Coefficients(JointStatistic):
    """A factor for each task vector, or for each tensor of each, kept under the names of the weights."""

    loss: Loss = "entropy"
    per: Per = "tensor"
    steps: int = 500
    rate: float = 1e-3
    batch: int = 16
    start: float = 0.3
    density: float = 1.0
    name: ClassVar = "coefficient"
    cost: ClassVar = 6.0
    copies: ClassVar = 4.0

    @property
    def draws(self) -> bool:
        return True

    def passes(self, rows: int) -> float:
        return self.steps * min(self.batch, rows) / rows

    def labelled(self, config: Mapping[str, Any]) -> bool:
        return self.loss == "cross-entropy" and speaks_of(config) == "classes"

    def form(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], where: str) -> Extent:
        told = speaks_of(config)
        if told is None:
            kind = (config.get("architectures") or ["no class"])[0]
            what = f"its config.json names {kind}, which has no head whose answers could be sure"
            raise PlanError(what, where, "give models with their heads, or merge: {method: tsv-merge}, without data")
        if told == "classes" and len(config.get("id2label") or {0: 0, 1: 1}) < 2:
            raise PlanError("its head says a number, which is never unsure", where, "write merge: {method: regmean}")
        if told == "tokens" and self.loss == "cross-entropy":
            what = "loss: cross-entropy takes one class for each row, and it has one for each token"
            raise PlanError(what, where, "write loss: entropy")
        return Extent({name: () for name, spec in specs.items() if spec.dtype.is_float})

    def together(
        self,
        networks: "Mapping[str, RunningNetwork]",
        examples: "Mapping[str, Sequence[Example]]",
        merger: Merger,
        seed: int,
        tell: Tell,
    ) -> Mapping[str, Found]:
        import torch

        learning = Learning(self, networks, merger)
        values = torch.nn.Parameter(learning.start())
        adam = torch.optim.Adam([values], lr=self.rate)
        total, told = sum(len(each) for each in examples.values()), 0
        with torch.inference_mode(False), torch.enable_grad():
            for step in range(self.steps):
                rows = {name: self._drawn(examples[name], seed, name, step) for name in networks}
                values.grad = learning.gradient(values.detach(), rows)
                adam.step()
                with torch.no_grad():
                    values.clamp_(0.0, 1.0)
                tell(total * (step + 1) // self.steps - told)
                told = total * (step + 1) // self.steps
        return learning.found(values.detach())

    def _drawn(self, examples: "Sequence[Example]", seed: int, model: str, step: int) -> "list[Example]":
        """The rows of one step: all rows in turn, in another order each time through."""
        import torch

        from mergetool.kernels.rng import stream_key

        count = min(self.batch, len(examples))
        turns = len(examples) // count
        key = stream_key(seed, "coefficient", model, str(step // turns))
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(key[0])).tolist()
        place = step % turns * count
        return [examples[each] for each in order[place : place + count]]


@dataclass
class Learning:
    """The loss of a merged model by its coefficients (models, groups of tensors), and its gradient."""

    settings: Coefficients
    networks: "Mapping[str, RunningNetwork]"
    merger: Merger
    bases: "dict[str, Tensor]" = field(init=False)
    vectors: "dict[str, list[Tensor]]" = field(init=False)
    """By name of a weight, the task vector of every model, in the order of the networks."""

    def __post_init__(self) -> None:
        from mergetool.kernels.consensus import keep_elected_

        self.bases, self.vectors = {}, {}
        device = next(iter(self.networks.values())).device
        for name in self.merger.names:
            found = self.merger.task_vectors(name)
            if found is not None:
                self.bases[name] = found[0].to(device)
                self.vectors[name] = [found[1][model].to(device) for model in self.networks]
                if self.settings.density < 1.0:
                    keep_elected_(self.vectors[name], self.settings.density)

    def start(self) -> "Tensor":
        """The coefficients that learning starts from (float64)."""
        import torch

        groups = len(self.vectors) if self.settings.per == "tensor" else 1
        return torch.full((len(self.networks), groups), self.settings.start, dtype=torch.float64)

    def loss(self, values: "Tensor", rows: "Mapping[str, Sequence[Example]]") -> float:
        """What the merged model's answers come to, without a gradient."""
        import torch

        self._put(values)
        with torch.no_grad():
            return sum(float(part) for name in self.networks for part in self._losses(name, rows[name]))

    def gradient(self, values: "Tensor", rows: "Mapping[str, Sequence[Example]]") -> "Tensor":
        """The derivative of the loss by every coefficient."""
        import torch

        self._put(values)
        total: dict[str, Tensor] = {}
        for name, network in self.networks.items():
            parameters = network.parameters()
            for part in self._losses(name, rows[name]):
                given = torch.autograd.grad(part, list(parameters.values()), allow_unused=True)
                known = {key: each for key, each in zip(parameters, given, strict=True) if each is not None}
                for key, gradient in network.stored(known).items():
                    if key in self.vectors:
                        total[key] = total[key].add_(gradient) if key in total else gradient.clone()
        each = torch.zeros(len(self.networks), len(self.vectors), dtype=torch.float64)
        for column, (key, vectors) in enumerate(self.vectors.items()):
            if key in total:
                flat = total[key].reshape(-1)
                each[:, column] = (
                    torch.stack([torch.dot(flat, vector.reshape(-1)) for vector in vectors]).cpu().double()
                )
        return each if self.settings.per == "tensor" else each.sum(1, keepdim=True)

    def found(self, values: "Tensor") -> dict[str, Found]:
        """Every model's coefficients by the names of the weights."""
        columns = values.expand(-1, len(self.vectors))
        return {
            model: Found({name: columns[row, place].clone() for place, name in enumerate(self.vectors)})
            for row, model in enumerate(self.networks)
        }

    def _put(self, values: "Tensor") -> None:
        """Set the merged weights in all networks."""
        columns = values.expand(-1, len(self.vectors)).tolist()
        for place, (name, vectors) in enumerate(self.vectors.items()):
            merged = self.bases[name].clone()
            for row, vector in enumerate(vectors):
                merged.add_(vector, alpha=columns[row][place])
            for network in self.networks.values():
                network.put({name: merged})

    def _losses(self, model: str, rows: "Sequence[Example]") -> "Iterator[Tensor]":
        """The losses of rows of one length, which add up to the mean over rows."""
        from mergetool.statistics.examples import batches

        network = self.networks[model]
        for batch in batches(rows):
            logits = network.model(**tensor_of(batch, network.device)).logits
            if not bool(logits.isfinite().all()):
                raise not_finite("what the merged model says", batch, network.where)
            each = entropies(logits) if self.settings.loss == "entropy" else surprises(logits, batch)
            yield each.sum() / len(rows)


def entropies(logits: "Tensor") -> "Tensor":
    """How unsure the answers to each row are; of answers to every token the mean."""
    says = logits.log_softmax(-1)
    unsure = -(says.exp() * says).sum(-1)
    return unsure.flatten(1).mean(1) if unsure.dim() > 1 else unsure


def surprises(logits: "Tensor", batch: "Sequence[Example]") -> "Tensor":
    """The cross-entropy of the class of each row; of a language model, the mean of that of its next tokens."""
    import torch

    if batch[0].label is not None:
        labels = torch.tensor([each.label for each in batch], device=logits.device)
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    ids = torch.tensor([each.inputs["input_ids"] for each in batch], device=logits.device)
    if ids.shape[1] < 2:
        return logits.flatten(1).sum(1) * 0
    return torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)
