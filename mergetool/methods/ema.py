"""Exponential moving average of the checkpoints of one run, the latest counting most.

`e_1 = x_1`, then `e_k = decay e_(k-1) + (1 - decay) x_k` over the models in the recipe's order. A checkpoint's share
halves every `log(1/2) / log(decay)` checkpoints. `models: {glob: "runs/checkpoint-*"}` takes them all in natural order;
one is read after the other, so that memory does not grow with their number. The slow weights of Lookahead, over
checkpoints that were saved where it synchronises, are this average with `decay: 1 - alpha`.

Reference: Polyak and Juditsky, Acceleration of stochastic approximation by averaging, SIAM 1992; Zhang et al.,
Lookahead optimizer, https://arxiv.org/abs/1907.08610.
Differs from the paper: averages checkpoints that were saved, not every step; training does not go on from it.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Field, Params, Scheduled, Stats, TensorGroup, TensorMethod, Unit

if TYPE_CHECKING:
    from torch import Tensor


class Ema(TensorMethod):
    """`decay (decay (x_1) + (1 - decay) x_2) + (1 - decay) x_3 ...`"""

    method: Literal["ema"] = "ema"
    decay: Scheduled[Unit] = Field(0.9, description="what is left of the average so far with every further checkpoint")
    needs_base: ClassVar = "unused"
    granularity: ClassVar = "element"
    buffers: ClassVar = 0
    folds: ClassVar = True
    exempt: ClassVar = {"order": "later checkpoints count more"}

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        import torch

        average = group.models[0]
        for model in group.models[1:]:
            torch.lerp(average, model, 1.0 - p.decay, out=average)
        return average
