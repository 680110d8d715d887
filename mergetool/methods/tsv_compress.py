"""Keep every expert as a few directions beside the base: a library from which each one can be rebuilt.

What fine-tuning changes in a weight matrix has few directions that matter. Each expert keeps its leading singular
vectors, as many as fit side by side with those of the others, so all experts together take about a third more than the
matrices they change, however many there are. Whoever knows the task gets its expert back nearly as good as it was:
`models: {sst2: {source: out/library, select: sst2}}` in a recipe, or `load_bundle(path)(tasks=["sst2"], ...)`.

Reference: Gargiulo et al., Task Singular Vectors, CVPR 2025, https://arxiv.org/abs/2412.00081, section 4.1.
Differs from the paper: what a model did not change takes no space; factors are rounded to bfloat16 unless `factors`
says otherwise; a tensor that is smaller in full than as factors is kept in full; convolutions are compressed, too.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from mergetool.arch.matrices import MatrixFilter
from mergetool.methods.base import BundleMethod, Field, Fraction

if TYPE_CHECKING:
    from mergetool.bundle.build import Options


class Energy(BaseModel):
    """As many directions as hold this share of a task vector's squared norm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    energy: Fraction


class TsvCompress(BundleMethod):
    """A library: base and factors per task"""

    method: Literal["tsv-compress"] = "tsv-compress"
    rank: Literal["auto"] | Annotated[int, Field(strict=True, ge=1)] | Fraction | Energy = Field(
        "auto",
        description="directions kept of each expert: auto (smaller dimension // number of experts), a number, "
        "a share of the smaller dimension, or {energy: share of the squared norm}",
    )
    factors: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="dtype of stored factors")
    base: Literal["copy", "reference"] = Field("copy", description="copy the base, or only refer to it")
    filter: MatrixFilter = Field(
        "fusionbench", description="which two-dimensional tensors are kept as factors; all others are kept in full"
    )
    conv: Literal["mean", "matricize"] = Field(
        "matricize", description="keep tensors of more axes in full, or as factors of (out, everything else)"
    )
    needs_base: ClassVar = "required"

    def options(self) -> "Options":
        from mergetool.bundle.build import Options

        return Options(
            kind="tsv-compress",
            rank=(self.rank.energy,) if isinstance(self.rank, Energy) else self.rank,
            filter=self.filter,
            conv=self.conv,
            dtype=self.factors,
            base=self.base,
        )
