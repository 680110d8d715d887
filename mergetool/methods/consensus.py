"""Add task vectors up, then keep only the entries that several of the models need.

Held against the sum of all task vectors, an entry matters to a model where its own change is large beside what the
others add to it (`threshold`). Entries that matter to no model disturb all of them, and entries that matter to one
model alone disturb the others; both go back to the base's value. What matters to `agreeing` models or more stays.

Reference: Wang et al., Localizing Task Information for Improved Model Merging and Compression, ICML 2024,
https://arxiv.org/abs/2405.07813, section 4 (TALL masks) and 5 (Consensus Task Arithmetic).
Differs from the paper: `threshold` is one number, or one for each model, that a recipe says (the authors choose one of
0.2 to 0.6 for each task by its validation data, and `scale` in the same way).
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from mergetool.methods.base import Field, Params, PerModel, Positive, TensorGroup
from mergetool.methods.families.deltas import DeltaMethod

if TYPE_CHECKING:
    from torch import Tensor


class Consensus(DeltaMethod):
    """`base + scale * sum(w_i (x_i - base))`, where it matters to several models"""

    method: Literal["consensus"] = "consensus"
    threshold: PerModel[Positive] = Field(
        0.4, description="an entry matters to a model whose change is more than this times what the others add to it"
    )
    agreeing: Annotated[int, Field(strict=True, ge=0)] = Field(
        2, description="models that an entry must matter to; 1 drops only what matters to none, 0 nothing"
    )
    exempt: ClassVar = {"copies": "task vectors are added up, not averaged"}
    neutral: ClassVar = {"agreeing": 1}

    def combined(self, group: TensorGroup, deltas: "list[Tensor]", p: Params) -> "Tensor":
        from mergetool.kernels.consensus import agreed_sum

        agreeing = min(self.agreeing, len(deltas) + 1)  # more than all: none
        return agreed_sum(deltas, p.threshold, agreeing, scratch=group.scratch)
