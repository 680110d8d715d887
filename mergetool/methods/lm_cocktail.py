"""Average models by how well each does on a few rows of the task at hand.

Of several fine-tunes (and the model that they come from, if it is listed) those that are least surprised by a few
labelled rows of a new task, or of a language model's texts, know most about it. Their weights in the average are the
softmax of minus their mean losses over `temperature`. The same rows are for all models: `calibration: {data: FILE}`.

Reference: Xiao et al., LM-Cocktail: Resilient Tuning of Language Models via Model Merging, Findings of ACL 2024,
https://arxiv.org/abs/2311.13534, section 3.
Differs from the paper: losses are means over rows, and of a language model over all its tokens (the authors' code has
means over batches, of the tokens behind a prompt). Its other half, an average of that mixture with a model tuned for
the task, is a recipe around this one (`models: {mixed: {recipe: ...}, tuned: ...}`, `method: linear`).
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Field, Params, Positive, Scheduled, Stats, TensorGroup, TensorMethod
from mergetool.methods.families.measured import Mean, mean, numbers

if TYPE_CHECKING:
    from torch import Tensor


class LmCocktail(TensorMethod):
    """`sum_i w_i x_i`, w = softmax(-loss_i / temperature)"""

    method: Literal["lm-cocktail"] = "lm-cocktail"
    temperature: Scheduled[Positive] = Field(5.0, description="how even the weights are; near 0 the best model is all")
    needs_base: ClassVar = "unused"
    granularity: ClassVar = "element"
    buffers: ClassVar = 1
    statistic: ClassVar = "loss"

    def needs_weights(self) -> str | None:
        return "it runs whole models on data"

    def unmeasured(self) -> TensorMethod:
        return Mean()

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        weights = _softmax(numbers(group), vars(p)["temperature"])
        for name, weight in zip(group.names, weights, strict=True):
            group.measure(f"weight of {name}", weight)
        return mean(group.models, weights)


def _softmax(losses: list[float], temperature: float) -> list[float]:
    """Weights that add up to 1, the largest for the smallest loss."""
    from math import exp

    least = min(losses)
    if temperature == 0:
        shares = [float(loss == least) for loss in losses]
    else:
        shares = [exp((least - loss) / temperature) for loss in losses]
    return [share / sum(shares) for share in shares]
