"""Bundles whose experts are masks of one change that they share, and the router that such a bundle may have."""

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Literal, cast

from pydantic import BaseModel, ConfigDict, field_validator

from mergetool.bundle.manifest import HeadRule, Mode, Pool
from mergetool.methods.base import RANK, Field, Finite, Rank, Unit
from mergetool.methods.families.bundle import BundleMethod

if TYPE_CHECKING:
    from mergetool.bundle.manifest import Kind
    from mergetool.bundle.options import Options


class NearestRouter(BaseModel):
    """How tasks are chosen for an input: by the directions that each task's own change of some matrices acts on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: Literal["auto"] | tuple[str, ...] = Field(
        "auto",
        description="matrices whose inputs are compared: auto (the output projections of all attention blocks; where "
        "there are none, all matrices inside layers), or globs on tensor names",
    )
    pool: Pool = Field("mean", description="which token's features, or the mean of all")
    norm: Literal["likelihood", "l2", "l1", "mahalanobis"] = Field(
        "likelihood", description="how distances are measured: minus log-likelihood, or a norm of what is left"
    )
    mode: Mode = Field(
        "weighted",
        description="coefficients: softmax of distances as they are, of standardised distances, or the nearest",
    )
    threshold: Unit = Field(0.2, description="tasks with a larger coefficient are chosen")
    top_k: Annotated[int, Field(strict=True, ge=1)] = Field(
        1, description="at most so many tasks for one input; several have the mean of their changes"
    )
    temperature: Annotated[Finite, Field(gt=0)] = Field(1.0, description="divides distances before the softmax")

    @field_validator("layers", mode="before")
    @classmethod
    def _as_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


class MasksMethod(BundleMethod):
    """A method that keeps a mask of one shared change for every expert."""

    rank: Rank = Field("auto", description=f"of what the router compares: {RANK}")
    factors: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="dtype of the shared change, and of the directions that the router compares"
    )
    router: NearestRouter | None = Field(
        NearestRouter(), description="how tasks are chosen for an input; null: a library, tasks are always named"
    )
    heads: HeadRule = Field(
        "joint",
        description="whose head answers: best probability (joint: times coefficient), or best or mean raw score",
    )

    @property
    @abstractmethod
    def least(self) -> float:
        """How many times what others add to an entry an expert's own change of it must exceed."""

    def options(self) -> "Options":
        from mergetool.bundle.options import Options, RouterOptions

        router = None
        if self.router is not None:
            router = RouterOptions(**self.router.model_dump(), features="base", redundancy=0.3)
        return Options(
            kind=cast("Kind", self.method_name()),
            rank=self.rank,
            filter="fusionbench",
            conv="mean",
            dtype=self.factors,
            size=None,
            base=self.base,
            router=router,
            heads=self.heads,
            margin=self.least,
        )
