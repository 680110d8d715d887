"""Average each parameter by how much it matters to each model: Fisher-weighted averaging.

A parameter that changes what a model says has a large Fisher information there; one that does not may take any value.
So each entry of the result is the mean of the models' entries, weighted by the diagonal of their Fisher information on
calibration data, which stands in the section `calibration`. The information is the mean over rows of squared gradients
of the log-likelihood, each row's by itself.

`labels` says of whose likelihood: `sampled`, of classes (or tokens) drawn from what the model itself says; `given`, of
those in the data (`label` of a row; in language models the tokens that come next); `exact`, of all classes, weighted by
their probability, which takes as many passes as there are classes.

Reference: Matena and Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022,
https://arxiv.org/abs/2111.09832, section 3.
Differs from the paper: a model's information is always divided by its root mean square over the model, which makes
models comparable (the paper's norm does the same for models of one size); the floor is a share of that, and for all
models, not for the target only.
Of information that is given, FusionBench makes the same merge. What it measures is another thing: it squares what rows
and classes (by the roots of their probabilities) add up to, and so do libraries that take a batch's gradient; here each
row and class is squared by itself. MergeBench takes the likeliest next token behind whole batches, and no norm.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mergetool.methods.base import Field, Params, Positive, Scheduled, Stats, TensorGroup
from mergetool.methods.families.measured import MeasuredMethod, mean

if TYPE_CHECKING:
    from torch import Tensor


class Fisher(MeasuredMethod):
    """`sum(w_i F_i x_i) / sum(w_i F_i)`, each F_i divided by its root mean square over the model"""

    method: Literal["fisher"] = "fisher"
    labels: Literal["sampled", "given", "exact"] = Field(
        "sampled", description="whose likelihood: drawn from what the model says, of the data, or of all classes"
    )
    floor: Scheduled[Positive] = Field(
        1e-6, description="what matters less counts as if it mattered this much, 1 being the model's root mean square"
    )
    granularity: ClassVar = "element"
    buffers: ClassVar = 4
    statistic: ClassVar = "fisher"
    exempt: ClassVar = {"independent": "each model's information is divided by its mean over the whole model"}

    def measuring(self) -> dict[str, Any]:
        return {"labels": self.labels}

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        assert group.measured is not None
        total, weight = group.scratch("total").zero_(), group.scratch("weight")
        out = group.scratch("out").zero_()
        for place, (share, model) in enumerate(zip(p.weight, group.models, strict=True)):
            scale = group.measured.size(place) or 1.0
            weight.copy_(group.measured.of(place)).div_(scale).clamp_(min=p.floor).mul_(share)
            total.add_(weight)
            out.add_(weight.mul_(model))
        if not bool((total > 0).all()):  # with no floor: nobody cares
            return out.div_(total).where(total > 0, mean(group.models, p.weight))
        return out.div_(total)
