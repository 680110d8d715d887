"""How much each parameter matters for what a model says: the diagonal of its Fisher information.

The mean over examples of squared gradients of the log-likelihood, each example's by itself: the square of a sum over a
batch would hold products of different examples. Whose likelihood: of a class drawn from what the model says
(`sampled`), of the class that is given (`given`: for language models, the tokens that come next), or of every class,
weighted by its probability (`exact`; for classifiers).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mergetool.errors import MergeError, PlanError
from mergetool.statistics.base import Extent, Found, Statistic, Tell, tensor_of
from mergetool.statistics.gram import not_finite
from mergetool.tensors.header import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergetool.networks.running import RunningNetwork
    from mergetool.networks.ways import WayBack
    from mergetool.statistics.examples import Example

Labels = Literal["sampled", "given", "exact"]
_HEADS = {
    "ForSequenceClassification": "classes",
    "ForImageClassification": "classes",
    "ForCausalLM": "next",
    "LMHeadModel": "next",
    "ForMaskedLM": "tokens",
    "ForTokenClassification": "tokens",
}
"""What a class of transformers says something about: whole rows, the next token, or every token."""


def speaks_of(config: Mapping[str, Any]) -> str | None:
    """What a model's head says something about; None without a head that is known."""
    (name, *_) = config.get("architectures") or [""]
    return next((told for ending, told in _HEADS.items() if str(name).endswith(ending)), None)


@dataclass(frozen=True)
class DiagonalFisher(Statistic):
    """The mean over examples of squared gradients."""

    labels: Labels = "sampled"
    name: ClassVar = "fisher"
    cost: ClassVar = 6.0
    copies: ClassVar = 2.5
    sums: ClassVar = 1.0
    by_layer: ClassVar = True

    @property
    def draws(self) -> bool:
        return self.labels == "sampled"

    def labelled(self, config: Mapping[str, Any]) -> bool:
        return self.labels == "given" and speaks_of(config) == "classes"

    def form(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], where: str) -> Extent:
        told, fix = speaks_of(config), "write labels: sampled"
        if told is None:
            kind = (config.get("architectures") or ["no class"])[0]
            what = f"its config.json names {kind}, which has no head whose answers could be likely"
            raise PlanError(what, where, f"give models with their heads ({', '.join(_HEADS)}), or method: regmean")
        if self.labels == "exact" and told != "classes":
            raise PlanError("labels: exact sums over all classes of a row, and it has none", where, fix)
        if self.labels == "given" and told == "tokens":
            raise PlanError("labels: given takes one class for each row, and it has one for each token", where, fix)
        if told == "classes" and config.get("problem_type") == "multi_label_classification":
            raise PlanError("it gives several classes to a row, which this cannot measure", where, "take regmean")
        return Extent({name: spec.shape for name, spec in specs.items() if spec.dtype.is_float})

    def measure(
        self, network: "RunningNetwork", examples: "Sequence[Example]", names: Collection[str], seed: int, tell: Tell
    ) -> Found:
        told, found = str(speaks_of(network.model.config.to_dict())), Found(network.keeping())

        def parts(number: int, answer: Any) -> "list[tuple[float, Tensor]]":
            logits, example = answer.logits[0], examples[number]
            if not bool(logits.isfinite().all()):
                raise not_finite("what it says", [example], network.where)
            return list(self._likelihoods(logits, example, told, (seed, number)))

        inputs = [tensor_of([example], network.device) for example in examples]
        with sparse_embeddings(network.model):
            for way in network.ways_back(inputs, parts):
                squares = self._squares(way, len(examples), tell)
                stored = network.stored(squares)
                _check_finite(stored, network.where)
                found.tensors.update((name, value) for name, value in stored.items() if name in names)
                del squares, stored  # before the next layer is read
        return found

    def _squares(self, way: "WayBack", count: int, tell: Tell) -> "dict[str, Tensor]":
        """The mean of squared gradients of the parameters of one way, by their names in memory."""
        import torch

        sums = {name: torch.zeros_like(value, requires_grad=False) for name, value in way.parameters.items()}

        def take(share: float, name: str, gradient: "Tensor") -> None:
            _add_square(sums[name], gradient, share)

        for number in range(count):
            way.run(number, take)
            tell(way.share(1))
        return {name: value.div_(count).cpu() for name, value in sums.items()}

    def _likelihoods(
        self, logits: "Tensor", example: "Example", told: str, draw: tuple[int, int]
    ) -> "Iterator[tuple[float, Tensor]]":
        """Log-likelihoods whose squared gradients add up, with the share of each."""
        if told == "classes" and logits.shape[-1] == 1:  # a normal distribution about the value: all values alike
            yield 1.0, logits.sum()
            return
        says = logits.log_softmax(-1)
        if self.labels == "exact":
            yield from zip(says.detach().exp().tolist(), says, strict=True)
        elif self.labels == "given" and told == "classes":
            yield 1.0, says[example.label or 0]
        elif self.labels == "given":
            yield 1.0, _of_tokens(says[:-1], _ids(example)[1:])
        elif told == "classes":
            yield 1.0, says[_drawn(says[None], draw)[0]]
        else:
            yield 1.0, _of_tokens(says, _drawn(says, draw))


def _ids(example: "Example") -> list[int]:
    return list(example.inputs["input_ids"])


def _of_tokens(says: "Tensor", ids: Sequence[int]) -> "Tensor":
    """The log-likelihood of one id for each token."""
    import torch

    return says.gather(-1, torch.tensor(ids, device=says.device)[:, None]).sum()


def _drawn(says: "Tensor", draw: tuple[int, int]) -> list[int]:
    """One class for each row of log-probabilities, drawn with the key of an example."""
    import torch

    from mergetool.kernels.rng import stream_key, uniform

    key = stream_key(draw[0], "fisher", str(draw[1]))
    at = (uniform(key, 0, torch.empty(len(says), 1, dtype=torch.float64)) + 1) / 2
    reached = says.detach().double().cpu().exp().cumsum(-1)
    found = torch.searchsorted(reached, at * reached[:, -1:]).squeeze(-1)
    return [int(each) for each in found.clamp(max=says.shape[-1] - 1)]


def _add_square(total: "Tensor", gradient: "Tensor", share: float) -> None:
    if gradient.is_sparse:  # an embedding: only rows of tokens that occur
        rows = gradient.coalesce()
        total.index_add_(0, rows.indices()[0], rows.values().square(), alpha=share)
    else:
        total.addcmul_(gradient, gradient, value=share)


class sparse_embeddings:  # noqa: N801  (a context, read like a function)
    """While inside, gradients of embeddings hold only the rows of tokens that occur."""

    def __init__(self, model: "nn.Module") -> None:
        self._model = model
        self._found: list[nn.Embedding] = []

    def __enter__(self) -> None:
        from torch import nn

        uses: dict[int, int] = {}
        for module in self._model.modules():
            for value in module._parameters.values():
                uses[id(value)] = uses.get(id(value), 0) + 1
        every = (each for each in self._model.modules() if type(each) is nn.Embedding)
        self._found = [each for each in every if uses[id(each.weight)] == 1 and not each.sparse]
        for each in self._found:
            each.sparse = True

    def __exit__(self, *_: object) -> None:
        for each in self._found:
            each.sparse = False


def _check_finite(values: "Mapping[str, Tensor]", where: str) -> None:
    for name, value in values.items():
        if not bool(value.isfinite().all()):
            fix = "write compute: {dtype: float64}, or repair that model (mergetool verify FOLDER scans it)"
            raise MergeError(f"the Fisher information of {name} is not finite", where, fix)
