"""Let merging change less where the base is most active: activation-informed merging.

Input channels through which much flows in the base carry what it has learned, and a change of their weights disturbs
most. On data that stand in the section `calibration`, the base is asked for the mean absolute value of every input
channel; the change of a channel's weights is multiplied by 1 where nothing flows, by `least` in the channel of each
layer where most does, and in between by a line. With `least: 1` nothing changes.

Reference: Nobari et al., Activation-Informed Merging of Large Language Models, https://arxiv.org/abs/2502.02421.
Differs from the paper: means are over tokens of rows without padding. Embeddings, biases, and heads that are the
embeddings stay as they were merged. Its authors take 256 rows of 512 tokens, and a `least` (omega) of 0.2 to 0.6.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.then import After, Field, Granularity, Params, Scheduled, TensorGroup, Unit

if TYPE_CHECKING:
    from torch import Tensor


class ActivationScale(After):
    """`change_ij * (1 - (1 - least) a_j / max a)`, a_j the mean absolute value of input channel j of the base"""

    step: Literal["activation-scale"] = "activation-scale"
    least: Scheduled[Unit] = Field(0.4, description="factor on the change of the most active input channel of a layer")
    needs_base: ClassVar = True
    statistic: ClassVar = "activation"
    buffers: ClassVar = 2

    def granularity_in(self, name: str, shape: tuple[int, ...]) -> Granularity:
        return "row" if len(shape) > 1 else "element"

    def apply(self, change: "Tensor", seen: "Tensor | None", group: TensorGroup, p: Params) -> "Tensor":
        active = None if group.measured is None else group.measured.of_base()
        if active is None or not float(active.max()) > 0:
            return change
        factors = 1.0 - (1.0 - p.least) / active.max() * active
        return change.mul_(_of_slice(factors, change, group))


def _of_slice(factors: "Tensor", change: "Tensor", group: TensorGroup) -> "Tensor":
    """Of factors of a whole tensor, or of its rows or columns, those of a slice."""
    if len(factors) != group.shape[0] or len(change) == group.shape[0]:
        return factors
    first = group.start // max(1, change[0].numel())
    return factors[first : first + len(change)]
