"""Keep of each task vector the changes that matter most to what the model says, elect signs, merge what agrees.

TIES takes large changes for important ones. What a change does to the answers depends on the parameter, too: to first
order the loss moves by half of `F d^2`, F being the diagonal Fisher information of the model on calibration data. So
entries are ranked by `|d| F^power`, which for the `power` of 0.5 is that; 0 is TIES. Signs and means are as there.

Reference: the trimming of Yadav et al., TIES-Merging, https://arxiv.org/abs/2306.01708, by the importance of Matena
and Raffel, Merging Models with Fisher-Weighted Averaging, https://arxiv.org/abs/2111.09832.
Differs from the paper: it is an idea of several papers, which differ in the score; here the Fisher information is
divided by its root mean square over the model, and what matters less than `floor` of that counts as mattering so much,
so that where data say nothing (rows of tokens that do not occur) the largest changes are kept. Trimming is tensor by
tensor.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mergetool.methods.base import (
    Field,
    Finite,
    Fraction,
    Params,
    PerModel,
    Positive,
    Scheduled,
    Stats,
    TensorGroup,
    TensorMethod,
    Unit,
)

if TYPE_CHECKING:
    from torch import Tensor


class Importance(TensorMethod):
    """`base + scale * mean of the entries of d_i with the largest |d_i| F_i^power that agree with the elected sign`"""

    method: Literal["importance"] = "importance"
    density: PerModel[Fraction] = Field(0.2, description="share of each task vector that is kept")
    weight: PerModel[Finite] = Field(1.0, description="weight of each task vector, in the vote and in the mean")
    scale: Scheduled[Finite] = Field(1.0, description="factor on the merged task vector")
    power: Scheduled[Unit] = Field(0.5, description="how much the Fisher information counts: 0 is trimming by size")
    floor: Scheduled[Positive] = Field(1e-6, description="least information of an entry, as a share of the model's")
    labels: Literal["sampled", "given", "exact"] = Field(
        "sampled", description="whose likelihood: drawn from what the model says, of the data, or of all classes"
    )
    needs_base: ClassVar = "required"
    granularity: ClassVar = "tensor"
    buffers: ClassVar = 6
    statistic: ClassVar = "fisher"
    neutral: ClassVar = {"density": 1.0}

    def measuring(self) -> dict[str, Any]:
        return {"labels": self.labels}

    def needs_weights(self) -> str | None:
        return "it runs whole models on data"

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        from mergetool.kernels.consensus import agreeing_sum_, keep_highest_

        assert group.base is not None
        densities = vars(p)["density"]
        for place, delta in enumerate(group.deltas):
            if densities[place] < 1.0:
                keep_highest_(delta, self._scores(delta, place, group, p), densities[place])
        merged = agreeing_sum_(group.deltas, p.weight, normalize=True, scratch=group.scratch)
        return group.base.add_(merged, alpha=p.scale)

    def _scores(self, delta: "Tensor", place: int, group: TensorGroup, p: Params) -> "Tensor":
        scores = group.scratch("scores").copy_(delta).abs_()
        if group.measured is None or vars(p)["power"] == 0:
            return scores
        share = group.measured.of(place).div_(group.measured.size(place) or 1.0).clamp_(min=vars(p)["floor"])
        return scores.mul_(share.pow_(vars(p)["power"]).view(scores.shape))
