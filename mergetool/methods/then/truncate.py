"""Keep the leading directions of what merging changed of each matrix.

The change of a matrix is replaced by its best approximation of a few directions (singular triplets): `rank` of them, or
as many as hold a share `energy` of its squared length. What is lost is measured, and stands in the lock. Vectors stay
as they are; tensors of more than two axes are matrices of (outputs, everything else).

Reference: Eckart and Young, The approximation of one matrix by another of lower rank, Psychometrika 1936.
Differs from the paper: nothing.
"""

from math import prod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import model_validator

from mergetool.methods.then import After, Field, Fraction, Granularity, Params, TensorGroup

if TYPE_CHECKING:
    from torch import Tensor


class Truncate(After):
    """`sum_(i <= rank) s_i u_i v_i` of `change = sum_i s_i u_i v_i`"""

    step: Literal["truncate"] = "truncate"
    rank: Annotated[int, Field(strict=True, ge=1)] | None = Field(None, description="directions that are kept")
    energy: Fraction | None = Field(
        None, description="instead of `rank`: as many directions as hold this share of the squared length"
    )
    buffers: ClassVar = 16

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.rank is None) == (self.energy is None):
            raise ValueError("expected `rank` (such as 64) or `energy` (such as 0.9), one of them")
        return self

    def granularity_in(self, name: str, shape: tuple[int, ...]) -> Granularity:
        return "tensor" if len(shape) > 1 and min(shape[0], prod(shape[1:])) > 1 else "element"

    def apply(self, change: "Tensor", seen: "Tensor | None", group: TensorGroup, p: Params) -> "Tensor":
        from mergetool.kernels.low_rank import leading

        whole = self.granularity_in(group.name, group.shape) == "tensor"
        if not whole or not bool(change.isfinite().all()):  # the check of the result will say whose
            return change
        pair, lost = leading(change.flatten(1), self.energy if self.rank is None else self.rank)
        group.measure("truncate: directions", pair.a.shape[0])
        group.measure("truncate: share of the length lost", lost)
        return change.copy_((pair.b @ pair.a).view_as(change))
