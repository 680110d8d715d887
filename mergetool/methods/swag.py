"""A model drawn from what the checkpoints of one run are like: SWAG's normal distribution around their mean.

Its covariance is half the variance of every weight and half that of the last `rank` checkpoints' deviations from the
mean so far. `scale: 0` gives the mean (SWA). `sample` numbers the draws: a recipe with `sweep: {sample: [0, 1, 2, 3]}`
writes several models in one run, to be asked together. One checkpoint is read after the other, so that memory does not
grow with their number.

Reference: Maddox et al., A simple baseline for Bayesian uncertainty in deep learning, NeurIPS 2019,
https://arxiv.org/abs/1902.02476, section 3.
Differs from the paper: batch norms keep the mean of their statistics; measure them anew on training data. Variances are
summed up by Welford's updates, which lose nothing to rounding.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from mergetool.methods.base import Field, Params, Positive, Scheduled, Stats, TensorGroup, TensorMethod

if TYPE_CHECKING:
    from torch import Tensor


class Swag(TensorMethod):
    """`mean + scale (sqrt(variance / 2) z_1 + sum_k deviation_k z_2k / sqrt(2 (K - 1)))`, z_1 and z_2 normal"""

    method: Literal["swag"] = "swag"
    scale: Scheduled[Positive] = Field(1.0, description="factor on what is drawn; 0: the mean")
    rank: Annotated[int, Field(strict=True, ge=0)] = Field(20, description="checkpoints whose deviations are kept")
    sample: Annotated[int, Field(strict=True, ge=0)] = Field(0, description="which of many draws")
    needs_base: ClassVar = "unused"
    granularity: ClassVar = "element"
    buffers: ClassVar = 8
    folds: ClassVar = True
    exempt: ClassVar = {
        "order": "deviations are from the mean so far, of the last checkpoints",
        "seed-free": "what is added to the mean is drawn",
        "tied": "draws are keyed by the tensor's name, so two stored copies of a tensor get two draws",
    }

    @property
    def needs_float64(self) -> bool:
        return True  # for draws from a normal distribution

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        import torch

        from mergetool.kernels.rng import normal, stream_key

        mean = group.scratch("mean").copy_(group.models[0])
        squares, deviations, before = (group.scratch(name).zero_() for name in ("squares", "deviations", "before"))
        count = len(group.names)
        kept = min(self.rank, count)
        together = stream_key(group.seed, "swag", str(self.sample))
        for place, model in enumerate(group.models[1:], 2):
            torch.sub(model, mean, out=before)
            mean.add_(before, alpha=1.0 / place)
            model.sub_(mean)
            squares.addcmul_(before, model)
            if place > count - kept and kept > 1:
                deviations.add_(model, alpha=float(normal(together, place, model.new_empty(1))))
        drawn = squares.div_(2 * count).sqrt_().mul_(normal(self._key(group), group.start, mean))
        if kept > 1:
            drawn.add_(deviations, alpha=(2.0 * (kept - 1)) ** -0.5)
        return mean.add_(drawn, alpha=p.scale)

    def _key(self, group: TensorGroup) -> "tuple[int, int]":
        from mergetool.kernels.rng import stream_key

        return stream_key(group.seed, group.name, "swag", str(self.sample))
