"""Take over only the changes of a model that matter most: large ones, in rows whose meaning shifted.

An entry's importance is its change times how much its row changed as a distribution: the Kullback-Leibler divergence of
the model's softmax over the row from the base's. What lies outside the bulk of all importances of a tensor (above the
median plus 1.5 times the distance between the quartiles) is taken over, the rest stays the base's.

Reference: none; mergekit's method of this name, by Arcee.
Differs from the paper: quartiles are exact and always the same, where mergekit's come from a random sample of large
tensors. The divergence has no small constants in it, and comes from differences that keep their digits; mergekit adds
logarithms up that almost cancel, and is left with rounding errors for the usual fine-tunes. So some entries near the
threshold are taken over by one and not by the other.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Params, StatisticsPass, Stats, TensorGroup, TensorMethod
from mergetool.methods.families.ranks import find

if TYPE_CHECKING:
    from torch import Tensor

_BULK = 1.5


class ArceeFusion(TensorMethod):
    """`base + the changes whose importance is an outlier`"""

    method: Literal["arcee-fusion"] = "arcee-fusion"
    needs_base: ClassVar = "required"
    max_models: ClassVar = 1
    granularity: ClassVar = "row"
    buffers: ClassVar = 7
    exempt: ClassVar = {
        "single": "most of the model's changes are left out, whatever the settings",
        "float64": "most of the model's changes are left out, whatever the settings",
        "scaling": "divergences do not grow in proportion, so others are outliers",
        "sign-flip": "the divergence between two distributions depends on which is the model's",
        "units": "a softmax is sharper for larger weights",
    }

    def statistics_pass(self, p: Params, num_elements: int, bits: int) -> StatisticsPass | None:
        if num_elements == 0:
            return None
        places = [int(share * (num_elements - 1)) for share in (0.25, 0.5, 0.75)]  # from the smallest
        return find(_importance, [(0, num_elements - place) for place in places], num_elements, bits, _threshold)

    @property
    def needs_float64(self) -> bool:
        return True

    def needs_weights(self) -> str | None:
        return "it measures changes against the base's weights"

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        from mergetool.kernels.masks import apply_, mask_below

        (importance,) = _importance(group, p)
        (delta,) = group.deltas
        assert group.base is not None
        return group.base.add_(apply_(delta, mask_below(importance, stats["threshold"][0], group.scratch)))


def _threshold(quartiles: Stats) -> Stats:
    first, median, third = quartiles["threshold"]
    return {"threshold": (median + _BULK * (third - first),)}


def _importance(group: TensorGroup, p: Params) -> "Sequence[Tensor]":
    """Change times divergence of the row, for every entry.

    With weights w of the base's softmax and changes d, the model's softmax is w exp(d) / (1 + s), where s is
    sum w (exp(d) - 1), and its divergence from the base's is sum w exp(d) d / (1 + s) - log(1 + s).
    """
    import torch

    from mergetool.kernels.sums import wide_row_sums

    assert group.base is not None
    (delta,) = group.deltas
    if delta.dim() == 0:
        return [torch.zeros_like(delta)]
    weights, grown = group.scratch("weights"), group.scratch("grown")
    torch.sub(group.base, group.base.amax(-1, keepdim=True), out=weights).exp_()
    torch.expm1(delta, out=grown).mul_(weights)
    whole = wide_row_sums(weights, group.scratch)
    shift = wide_row_sums(grown, group.scratch) / whole
    mean = wide_row_sums(grown.add_(weights).mul_(delta), group.scratch) / whole / (1.0 + shift)
    divergence = (mean - shift.log1p()).clamp_(min=0.0).to(delta.dtype)
    return [torch.mul(delta, divergence, out=weights).abs_()]
