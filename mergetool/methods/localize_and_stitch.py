"""Keep of each task vector only its largest entries in the whole model, and average where they meet.

A small share of what fine-tuning changed holds most of a skill. Of each task vector the largest `density` of the whole
model stays, so that layers that changed more keep more. These sparse vectors meet in few places: where only one model
kept an entry it is taken over in full, and where several did their values are averaged.

Reference: He et al., Localize-and-Stitch: Efficient Model Merging via Sparse Task Arithmetic, TMLR 2024,
https://arxiv.org/abs/2408.13656, section 3, without data ("dataless"). `density` is that of the authors' code for
language models; for vision models it is 0.1.
Differs from the paper: no masks are trained. Of models that kept an entry, those that had not changed it do not count.
`weight`, `rescale: l1` and `scope: tensor` are not the paper's.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Field, Fraction, Params, PerModel, TensorGroup
from mergetool.methods.families.scope import ScopedMethod
from mergetool.methods.families.trimmed import LargestMethod

if TYPE_CHECKING:
    from torch import Tensor


class LocalizeAndStitch(LargestMethod):
    """`base + scale * mean, over the models that kept an entry, of the largest of x_i - base`"""

    method: Literal["localize-and-stitch"] = "localize-and-stitch"
    density: PerModel[Fraction] = Field(0.05, description="share of each task vector that is kept")
    scope: Literal["tensor", "model"] = Field("model", description="what `density` is a share of")
    normalize: bool = Field(
        True, strict=True, description="divide by the weights of the models that kept an entry (mean); false: sum"
    )
    exempt: ClassVar = {**ScopedMethod.alike, **LargestMethod.exempt}

    def reduced(self, group: TensorGroup, p: Params) -> "tuple[Tensor, float]":
        from mergetool.kernels.consensus import kept_mean

        if not self.normalize:
            return super().reduced(group, p)
        return kept_mean(group.deltas, p.weight, scratch=group.scratch), 1.0
