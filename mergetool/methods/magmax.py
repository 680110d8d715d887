"""Of all task vectors take, entry by entry, the largest change.

What a model changed most matters most to it; sums and means of many task vectors bury that under the small changes of
the others. So every entry of the result comes from one model, the one that moved it furthest. Made for models that
were fine-tuned one after the other, and good for models fine-tuned side by side.

Reference: Marczak et al., MagMax: Leveraging Model Merging for Seamless Continual Learning, ECCV 2024,
https://arxiv.org/abs/2407.06322, section 4. `scale` is what the authors use for eight tasks.
Differs from the paper: task vectors may be weighted before they are compared. Of changes equally large the later
model's is taken, as in the authors' code.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Field, Finite, Params, Scheduled, TensorGroup
from mergetool.methods.families.deltas import DeltaMethod

if TYPE_CHECKING:
    from torch import Tensor


class Magmax(DeltaMethod):
    """`base + scale * the largest of w_i (x_i - base)`"""

    method: Literal["magmax"] = "magmax"
    scale: Scheduled[Finite] = Field(0.5, description="factor on the merged task vector (lambda in the paper)")
    neutral: ClassVar = {"scale": 1.0}
    exempt: ClassVar = {"order": "of changes that are equally large the later model's is taken"}

    def combined(self, group: TensorGroup, deltas: "list[Tensor]", p: Params) -> "Tensor":
        from mergetool.kernels.consensus import largest_

        return largest_(deltas, scratch=group.scratch)
