"""Methods whose result is a folder that serves many tasks."""

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import model_validator

from mergetool.arch.matrices import MatrixFilter
from mergetool.bundle.manifest import HeadRule
from mergetool.methods.base import RANK, Field, Finite, Method, Params, Rank, Stats, TensorGroup, TensorMethod

if TYPE_CHECKING:
    from torch import Tensor

    from mergetool.bundle.manifest import Kind
    from mergetool.bundle.options import Options


class _Kept(TensorMethod):
    """Stands in a plan for what a bundle does to a tensor: it sees it whole, in every model."""

    needs_base: ClassVar = "required"
    granularity: ClassVar = "tensor"
    buffers: ClassVar = 16

    @property
    def needs_float64(self) -> bool:
        return True

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        raise NotImplementedError


class BundleMethod(Method):
    """A method whose result is a folder that serves many tasks (`mergetool.bundle`), not a checkpoint."""

    base: Literal["copy", "reference"] = Field("copy", description="copy the base, or only refer to it")
    needs_base: ClassVar = "required"
    uses_factors: ClassVar = True
    result: ClassVar = "bundle"
    varies: ClassVar = False
    apart: ClassVar[bool] = True
    """Whether how many directions an expert keeps is all that it takes from the others."""

    def stages(self) -> tuple[str, ...]:
        return ("factorise",)

    def kernel(self) -> TensorMethod:
        return _Kept()

    @abstractmethod
    def options(self) -> "Options":
        """What is kept of the models, and how the bundle is used."""


class FactorsMethod(BundleMethod):
    """One that keeps a few directions of every expert's changes."""

    rank: Rank = Field("auto", description=RANK)
    factors: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="dtype of stored factors")
    size: Annotated[Finite, Field(gt=0)] | None = Field(
        None,
        description="most that the factors of all experts may take, as a share of the base's bytes; directions that "
        "hold the least energy are left out beyond it (default: with `rank: auto`, 0.59 of a base in float32 for "
        "factors of two bytes, and the same directions in other dtypes; else no bound)",
    )
    filter: MatrixFilter = Field(
        "fusionbench", description="which two-dimensional tensors are kept as factors; all others are kept in full"
    )
    conv: Literal["mean", "matricize"] = Field(
        "matricize", description="keep tensors of more axes in full, or as factors of (out, everything else)"
    )

    @property
    def most(self) -> float | None:
        """The bound on the size of factors."""
        return 0.59 if self.size is None and self.rank == "auto" else self.size

    def kept(self, kind: "Kind") -> "Options":
        """What a bundle of this kind keeps, without a router."""
        from mergetool.bundle.options import Options

        kept = (self.rank, self.filter, self.conv, self.factors, self.most, self.base)
        return Options(kind, *kept, of_numbers=self.size is None)


class RoutedMethod(FactorsMethod):
    """One whose bundle needs directions to route by, and asks the heads of several tasks."""

    heads: HeadRule = Field(
        "joint",
        description="whose head answers: best probability (joint: times coefficient), or best or mean raw score",
    )

    @model_validator(mode="after")
    def _has_matrices(self) -> Self:
        if self.filter == "none":
            raise ValueError("without matrices there is nothing to route by (filter)")
        return self
