"""Make every direction of a merged matrix as strong as the tasks have it, no task counted twice.

What tasks share, a sum holds several times over, and drowns what they do not share. SVC asks each singular direction of
the merged task vector how much more than every single task wants there it does, and divides its singular value by the
mean of that. A task that gets less than `least` of what it wants counts as getting that much, so that nothing is
blown up. Vectors stay as they are, and so do tensors that are no matrices.

Reference: SVC, https://arxiv.org/abs/2602.05536.
Differs from the paper: directions in which nothing was changed stay so; embeddings are not matrices unless `filter`
says so.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from mergetool.arch.matrices import MatrixFilter, is_matrix
from mergetool.methods.then import After, Field, Finite, Granularity, Params, TensorGroup, changes

if TYPE_CHECKING:
    from torch import Tensor


class Svc(After):
    """`s_r <- s_r T / sum_t max(least, <u_r^T M, u_r^T D_t> / |u_r^T D_t|^2)`"""

    step: Literal["svc"] = "svc"
    least: Annotated[Finite, Field(gt=0)] | None = Field(
        None,
        description="what a task counts as getting at least: one over the number of models, if nothing is said; 1 is "
        "right after tsv-merge",
    )
    filter: MatrixFilter = Field("llm", description="which two-dimensional tensors are treated as matrices")
    needs_base: ClassVar = True
    buffers: ClassVar = 24

    def granularity_in(self, name: str, shape: tuple[int, ...]) -> Granularity:
        return "tensor" if is_matrix(name, shape, self.filter, conv="mean") else "element"

    def look(self, group: TensorGroup, p: Params) -> "Tensor | None":
        import torch

        if self.granularity_in(group.name, group.shape) == "element":
            return None
        return torch.stack([change.clone() for change in changes(group)])

    def apply(self, change: "Tensor", seen: "Tensor | None", group: TensorGroup, p: Params) -> "Tensor":
        from mergetool.kernels.spectra import calibrated

        if seen is None or not bool(change.isfinite().all()):  # the check of the result will say whose
            return change
        made, gains = calibrated(change, list(seen), self.least or 1 / len(seen))
        if len(gains):
            group.measure("svc: factor of the strongest direction", float(gains[0]))
        return change.copy_(made)
