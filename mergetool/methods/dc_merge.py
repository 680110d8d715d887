"""Smooth each task vector's singular values, then merge in one basis of the directions of all tasks.

A few directions hold most of what fine-tuning changed, and a merge forgets the others although tasks need them. So the
singular values of every task vector are made more equal (`smooth`). The singular vectors of all tasks, made
orthogonal, are a basis in which each task vector is nearly a block of its own; there the largest entries of each
(`density`) vote on signs and are averaged as in TIES, and what lies outside of the blocks is dropped. Weights that are
no matrices (norms, biases) are averaged. Averaging and dropping make the result small, 2 to 4 times as a rule:
`scale: recover` gives task vectors their length back, up to 3 times.

Reference: Zhang et al., DC-Merge, CVPR 2026, https://arxiv.org/abs/2603.06242.
Differs from the paper: directions that carry nothing (of low-rank task vectors, of copies) are left out, where the
authors' code spreads strength over arbitrary ones; at least as many entries of a task are kept as it has directions, so
that the same `density` serves large matrices and the small cores of adapters; the scale is counted; embeddings are not
matrices unless `filter` says so; weights per model multiply task vectors.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from mergetool.methods.base import RANK, Field, Finite, Fraction, Rank, Scale, TensorGroup
from mergetool.methods.families.matrix import most_directions
from mergetool.methods.families.recovering import DEPENDS, SCALE, RecoveringMethod

if TYPE_CHECKING:
    from torch import Tensor


class DcMerge(RecoveringMethod):
    """`base + scale * U blocks(merge(U^T D_1 V, ..., U^T D_T V)) V^T`, U and V orthogonal directions of all tasks"""

    method: Literal["dc-merge"] = "dc-merge"
    scale: Scale = Field("recover", description=SCALE)
    rank: Rank = Field("auto", description=RANK)
    smooth: Literal["average", "linear", "none"] = Field(
        "average", description="singular values of a task: all their mean, in a straight line, or as they are"
    )
    rho: Annotated[Finite, Field(ge=1)] = Field(
        5.0, description="with `smooth: linear`: how many times the smallest the largest may be"
    )
    density: Fraction = Field(0.001, description="share of the entries that each task keeps in the common basis")
    combine: Literal["ties", "sum"] = Field("ties", description="elect signs and average what agrees, or add up")
    buffers: ClassVar = 24
    exempt: ClassVar = DEPENDS
    neutral: ClassVar = {"filter": "none"}

    def merged(
        self, group: TensorGroup, matrices: "list[Tensor]", weights: Sequence[float], size: int
    ) -> "Tensor | None":
        from mergetool.kernels.directions import merged_in_common_basis, smoothed
        from mergetool.kernels.spectral import Factors, kept, live_factors_of

        if not (most := most_directions(group, self.rank, size, len(matrices))):
            return None
        tasks = []
        every = live_factors_of(matrices, min(most, *matrices[0].shape))
        for factors, weight in zip(every, weights, strict=True):
            task = kept(factors, self.rank)
            tasks.append(Factors(task.u, weight * smoothed(task.s, self.smooth, self.rho), task.v))
        return merged_in_common_basis(tasks, self.density, vote=self.combine == "ties")
