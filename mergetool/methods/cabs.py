"""Thin task vectors out so that no two of them keep the same entry: models choose one after the other, block by block.

Task vectors that keep different entries cannot disturb one another, and entries spread evenly over a tensor say more
than its few largest regions. So tensors are cut into small blocks. In each, the first model keeps its largest changes,
the next one its largest among the entries that are left, and so on; what is kept is added up. The order of the models
matters: the first one chooses freely.

Reference: Yang et al., CABS: Conflict-Aware and Balanced Sparsification for Enhancing Model Merging, ICML 2025,
https://arxiv.org/abs/2503.01874, section 4. `density` and `block` are the authors' 64:256 for language models, where
`weight` is 1.2.
Differs from the paper: any number of models; where less than a model's share is left of a block it keeps that (the
authors' code for two models lets them overlap then). Blocks begin anew with each row (all that belongs to one index
of the first axis), and the rest of a row is a shorter block; the authors' blocks run over the flat tensor, and one of
their scripts drops its rest.
"""

from typing import Annotated, ClassVar, Literal

from mergetool.methods.base import Field, Fraction, Params, PerModel, Stats, TensorGroup
from mergetool.methods.families.sparse import SparseMethod


class Cabs(SparseMethod):
    """`base + scale * sum(w_i (x_i - base), the largest of each block that no model before has kept)`"""

    method: Literal["cabs"] = "cabs"
    density: PerModel[Fraction] = Field(0.25, description="share of each block that a model keeps")
    block: Annotated[int, Field(strict=True, ge=1)] = Field(256, description="length of a block")
    granularity: ClassVar = "row"
    pass_depends_on: ClassVar = ("density", "weight")
    exempt: ClassVar = {
        "order": "models choose entries one after the other",
        "copies": "later copies keep other entries than the first",
    }

    def thin(self, group: TensorGroup, p: Params, stats: Stats) -> None:
        import torch

        from mergetool.kernels.blocks import keep_in_blocks_

        whole = torch.int32 if group.models[0].dtype == torch.float32 else torch.int64
        taken = group.scratch("taken", whole).zero_()
        rows = (1 if taken.dim() < 2 else len(taken), -1)
        for delta, density, weight in zip(group.deltas, p.density, p.weight, strict=True):
            if weight == 0.0:  # takes nothing from those that come after it
                continue
            in_rows = delta.view(rows)
            keep_in_blocks_(in_rows, taken.view(rows), self.block, density, lambda *key: group.scratch(*key).view(rows))
