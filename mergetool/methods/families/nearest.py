"""Which tasks an input belongs to: what all routers of bundles can be told; some ask nothing else."""

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from mergetool.bundle.manifest import Mode, Pool, UnknownRule
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
    unknown: UnknownRule | None = Field(
        None,
        description="what becomes of inputs like those of no task: no answer (refuse), the base's answer (base, of "
        "language models), or that of the nearest task, which tells (nearest); they are found by running the base on "
        "made-up inputs as the bundle is made (default: all inputs are answered)",
    )
    doubt: Annotated[Finite, Field(gt=0)] = Field(
        1.0,
        description="with more of it an input is unknown: 0 is the doubt about usual inputs, 1 that about strange ones",
    )
    rank: Annotated[int, Field(strict=True, ge=1)] | None = Field(
        None,
        description="directions of every expert that inputs are compared with, in a file of their own (default: those "
        "that are kept, which get few where many experts share the space; about a quarter of the features is best)",
    )
    early: Annotated[int, Field(strict=True, ge=1)] | None = Field(
        None,
        description="read so many first tokens of a text alone, and the whole only where they leave a doubt (faster); "
        "with `unknown`, half of them are its last ones, and all is read until the bundle is calibrated",
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _as_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        if self.unknown is None and self.doubt != type(self).model_fields["doubt"].default:
            raise ValueError("without `unknown` nothing is asked about an input: write e.g. unknown: refuse")
        if self.early is not None and self.norm != "likelihood":
            raise ValueError("`early` asks how likely tasks are: leave it out, or `norm`")
        return self

    def options(self) -> "RouterOptions":
        """As a bundle's build sees it."""
        from mergetool.bundle.options import RouterOptions

        return RouterOptions(**self.model_dump(), features="base", redundancy=0.3)


class SharesRouter(NearestRouter):
    """How probable tasks are, for bundles in which an input has shares of all experts."""

    @model_validator(mode="after")
    def _leaves_nothing_to_the_base(self) -> Self:
        if self.unknown == "base":
            what = "`unknown: base` cannot be: every input has shares of all experts, and none is the base's alone"
            raise ValueError(f"{what}. Write unknown: refuse, or unknown: nearest")
        return self
