"""Which tasks an input belongs to: what all routers of bundles can be told; some ask nothing else."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from mergetool.bundle.manifest import Mode, Pool
from mergetool.methods.base import Field, Finite, Unit

if TYPE_CHECKING:
    from mergetool.bundle.options import RouterOptions


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
    top_k: Annotated[int, Field(strict=True, ge=1)] = Field(1, description="at most so many tasks for one input")
    temperature: Annotated[Finite, Field(gt=0)] = Field(1.0, description="divides distances before the softmax")

    @field_validator("layers", mode="before")
    @classmethod
    def _as_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    def options(self) -> "RouterOptions":
        """As a bundle's build sees it."""
        from mergetool.bundle.options import RouterOptions

        return RouterOptions(**self.model_dump(), features="base", redundancy=0.3)
