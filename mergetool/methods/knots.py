"""Turn task vectors into a common basis of output directions, then merge entry by entry there.

Methods that vote on single entries assume that the same entry means the same thing in every model. Fine-tunes by LoRA
do not line up like that. The singular vectors of all task vectors laid side by side, `[D1 ... DT] = U S V^T`, give a
basis U in which each task vector is `U C_t`; the `C_t = U^T D_t` line up, are merged by TIES, and turned back by U.
Weights that are no matrices (norms, biases) are merged in the same way without a change of basis.

Reference: Stoica et al., Model merging with SVD to tie the KnOTS, ICLR 2025, https://arxiv.org/abs/2410.19735.
Differs from the paper: thresholds are per tensor, where the paper trims all layers together; biases are merged by
themselves instead of as one more column of their weight; directions count as zero relative to the largest one.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.arch.matrices import MatrixFilter, is_matrix
from mergetool.methods.base import (
    Factored,
    Field,
    Finite,
    Fraction,
    Params,
    PerModel,
    Scheduled,
    Stats,
    TensorGroup,
    TensorMethod,
)

if TYPE_CHECKING:
    from torch import Tensor


class Knots(TensorMethod):
    """`base + scale * U merge(U^T D_1, ..., U^T D_T)`, where U spans what all task vectors write"""

    method: Literal["knots"] = "knots"
    combine: Literal["ties", "mean"] = Field("ties", description="how entries are merged in the common basis")
    density: PerModel[Fraction] = Field(0.2, description="share of each task vector's entries that TIES keeps")
    weight: PerModel[Finite] = Field(1.0, description="weight of each task vector; 0 leaves the model out")
    scale: Scheduled[Finite] = Field(1.0, description="factor on the merged task vector")
    stack: Literal["inputs", "outputs"] = Field(
        "inputs", description="lay task vectors side by side along inputs (a basis of outputs) or along outputs"
    )
    filter: MatrixFilter = Field(
        "llm", description="which two-dimensional tensors are treated as matrices; others keep their own basis"
    )
    needs_base: ClassVar = "required"
    granularity: ClassVar = "tensor"
    buffers: ClassVar = 20
    neutral: ClassVar = {"density": 1.0}

    @property
    def needs_float64(self) -> bool:
        return self.filter != "none"

    def in_factors(self, name: str, shape: tuple[int, ...]) -> Factored:
        if not is_matrix(name, shape, self.filter, conv="mean"):
            return "product" if self.combine == "ties" else "cores"
        return "outputs" if self.stack == "inputs" else "inputs"

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        assert group.base is not None
        chosen = [index for index, weight in enumerate(p.weight) if weight]
        if not chosen:
            return group.base
        deltas = [group.deltas[index] for index in chosen]
        p = Params(scale=p.scale, **{key: tuple(getattr(p, key)[i] for i in chosen) for key in ("weight", "density")})
        finite = all(bool(delta.isfinite().all()) for delta in deltas)
        if not finite or not is_matrix(group.name, group.shape, self.filter, conv="mean"):
            return group.base.add_(self._combined(deltas, p), alpha=p.scale)
        turned = self.stack == "outputs"
        update = self._in_common_basis([delta.mT if turned else delta for delta in deltas], p)
        return group.base.add_(update.mT if turned else update, alpha=p.scale)

    def _in_common_basis(self, deltas: "list[Tensor]", p: Params) -> "Tensor":
        import torch

        from mergetool.kernels.spectral import live_directions

        basis = live_directions(deltas)
        turn = basis.mT.to(deltas[0].dtype)
        parts = [turn @ delta for delta in deltas]
        if basis.shape[1] == 0:
            return torch.zeros_like(deltas[0])
        return (basis @ self._combined(parts, p).to(basis.dtype)).to(deltas[0].dtype)

    def _combined(self, parts: "list[Tensor]", p: Params) -> "Tensor":
        """The entrywise merge. Overwrites `parts`."""
        import torch

        from mergetool.kernels.consensus import agreeing_sum_
        from mergetool.kernels.directions import trim_

        if self.combine == "mean":
            total = torch.zeros_like(parts[0])
            for weight, part in zip(p.weight, parts, strict=True):
                total.add_(part, alpha=weight / len(parts))
            return total
        for density, part in zip(p.density, parts, strict=True):
            trim_(part, density)
        return agreeing_sum_(
            parts,
            p.weight,
            normalize=True,
            scratch=lambda _, dtype: torch.empty_like(parts[0], dtype=dtype),
        )
