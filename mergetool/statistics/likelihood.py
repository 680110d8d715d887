"""What a model says of an example, how likely that is, and gradients of it, one example at a time."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from mergetool.errors import MergeError, PlanError
from mergetool.statistics.base import tensor_of
from mergetool.statistics.gram import not_finite

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergetool.networks.running import RunningNetwork
    from mergetool.statistics.examples import Example

Labels = Literal["sampled", "given", "exact"]
_HEADS = {
    "ForSequenceClassification": "classes",
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


def check_head(config: Mapping[str, Any], labels: Labels, where: str) -> None:
    """Raise PlanError for a model whose answers have no such likelihood."""
    told, fix = speaks_of(config), "write labels: sampled"
    if told is None:
        kind = (config.get("architectures") or ["no class"])[0]
        what = f"its config.json names {kind}, which has no head whose answers could be likely"
        raise PlanError(what, where, f"give models with their heads ({', '.join(_HEADS)}), or method: regmean")
    if labels == "exact" and told != "classes":
        raise PlanError("labels: exact sums over all classes of a row, and it has none", where, fix)
    if labels == "given" and told == "tokens":
        raise PlanError("labels: given takes one class for each row, and it has one for each token", where, fix)
    if told == "classes" and config.get("problem_type") == "multi_label_classification":
        raise PlanError("it gives several classes to a row, which this cannot measure", where, "take regmean")


def gradients(
    network: "RunningNetwork", examples: "Sequence[Example]", labels: Labels, seed: int
) -> "Iterator[list[tuple[float, Sequence[Tensor | None]]]]":
    """For each example: gradients of log-likelihoods by every parameter, with the share of each likelihood.

    Raises MergeError, which names the row, where what the model says is not finite.
    """
    import torch

    parameters, told = list(network.parameters().values()), str(speaks_of(network.model.config.to_dict()))
    with _sparse_embeddings(network.model):
        for number, example in enumerate(examples):
            logits = network.model(**tensor_of([example], network.device)).logits[0]
            if not bool(logits.isfinite().all()):
                raise not_finite("what it says", [example], network.where)
            parts = list(_likelihoods(logits, example, told, labels, (seed, number)))
            yield [
                (share, torch.autograd.grad(each, parameters, retain_graph=each is not parts[-1][1], allow_unused=True))
                for share, each in parts
            ]


def _likelihoods(
    logits: "Tensor", example: "Example", told: str, labels: Labels, draw: tuple[int, int]
) -> "Iterator[tuple[float, Tensor]]":
    """Log-likelihoods whose squared gradients add up, with the share of each."""
    if told == "classes" and logits.shape[-1] == 1:  # a normal distribution about the value: all values alike
        yield 1.0, logits.sum()
        return
    says = logits.log_softmax(-1)
    if labels == "exact":
        yield from zip(says.detach().exp().tolist(), says, strict=True)
    elif labels == "given" and told == "classes":
        yield 1.0, says[example.label or 0]
    elif labels == "given":
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


@contextmanager
def _sparse_embeddings(model: "nn.Module") -> Iterator[None]:
    """While inside, gradients of embeddings hold only the rows of tokens that occur."""
    from torch import nn

    uses: dict[int, int] = {}
    for module in model.modules():
        for value in module._parameters.values():
            uses[id(value)] = uses.get(id(value), 0) + 1
    every = [each for each in model.modules() if type(each) is nn.Embedding]
    found = [each for each in every if uses[id(each.weight)] == 1 and not each.sparse]
    for each in found:
        each.sparse = True
    try:
        yield
    finally:
        for each in found:
            each.sparse = False


def check_finite(values: "Mapping[str, Tensor]", what: str, where: str) -> None:
    """Raise MergeError for a statistic that is no number."""
    for name, value in values.items():
        if not bool(value.isfinite().all()):
            fix = "write compute: {dtype: float64}, or repair that model (mergetool verify FOLDER scans it)"
            raise MergeError(f"the {what} of {name} is not finite", where, fix)
