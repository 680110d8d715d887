"""Keep a fine-tune, but where it turned away from what made its base safe take some of a safe fine-tune.

Fine-tuning on harmless data can undo what a model learnt about harm. What alignment changed of each matrix (`aligned -
unaligned`) spans a subspace; a fine-tune whose change of that matrix hardly lies there has left it. Matrix by matrix
the cosine of the change and of its projection is taken. Where it is below `threshold`, the change becomes `keep` of it
and the rest of that of a model that was tuned to be safe; elsewhere, and where a tensor is no matrix, the fine-tune
stays as it is. The base is the aligned model that the others were tuned from. The models are, in this order: the
fine-tune, the safe one, and the model before alignment. No data are needed.

Reference: Djuhera et al., SafeMERGE: Preserving Safety Alignment in Fine-Tuned Large Language Models via Selective
Layer-Wise Model Merging, https://arxiv.org/abs/2503.17239.
Differs from the paper: whole models, or adapters, not LoRA sites matched by their order; matrices of attention and MLP
alike. As in the authors' code the projection is `V V^T` of the change V by alignment, whose length the cosine does not
see; the matrix of outputs by outputs is never formed. Its numbers: threshold 0.35, keep 0.8.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from mergetool.arch.matrices import MatrixFilter, is_matrix
from mergetool.methods.base import (
    Field,
    Finite,
    Granularity,
    Params,
    Scheduled,
    Stats,
    TensorGroup,
    TensorMethod,
    Unit,
)

if TYPE_CHECKING:
    from torch import Tensor


class SafeMerge(TensorMethod):
    """`d if cos(V V^T d, d) >= threshold else keep * d + (1 - keep) * d_safe`, V what alignment changed"""

    method: Literal["safemerge"] = "safemerge"
    threshold: Annotated[Finite, Field(ge=-1, le=1)] = Field(0.35, description="least cosine of a change that stays")
    keep: Scheduled[Unit] = Field(0.8, description="share of the fine-tune where it has left what alignment changed")
    filter: MatrixFilter = Field("llm", description="which two-dimensional tensors are treated as matrices")
    needs_base: ClassVar = "required"
    granularity: ClassVar = "tensor"
    buffers: ClassVar = 3
    min_models: ClassVar = 3
    max_models: ClassVar = 3
    exempt: ClassVar = {"order": "the models are the fine-tune, the safe one and the one before alignment"}

    def granularity_in(self, name: str, shape: tuple[int, ...]) -> Granularity:
        return "tensor" if is_matrix(name, shape, self.filter, conv="mean") else "element"

    def treatment(self, name: str, shape: tuple[int, ...]) -> str:
        return "safemerge" if self.granularity_in(name, shape) == "tensor" else "first model"

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        assert group.base is not None
        change, safe, alignment = group.deltas  # of the aligned base: the last is minus what alignment changed
        if self.granularity_in(group.name, group.shape) == "tensor":
            cosine = _cosine(alignment, change)
            group.measure("safemerge: cosine with the subspace of alignment", cosine)
            if cosine < self.threshold:
                group.note("left the subspace of alignment: merged with the safe model")
                change = change.mul_(vars(p)["keep"]).add_(safe, alpha=1.0 - vars(p)["keep"])
        for other in (safe, alignment):
            group.base.add_(other, alpha=0.0)  # what is not finite is never lost
        return group.base.add_(change)


def _cosine(alignment: "Tensor", change: "Tensor") -> float:
    """Of `change` and `V V^T change`; 1 where alignment, or the fine-tune, has changed nothing."""
    import torch

    if not (bool(alignment.any()) and bool(change.any())):
        return 1.0
    projected = alignment @ (alignment.mT @ change)
    length = float(torch.linalg.norm(projected)) * float(torch.linalg.norm(change))
    return float(torch.sum(projected * change)) / length if length > 0 else 0.0
