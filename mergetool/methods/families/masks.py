"""Bundles whose experts are masks of one change that they share."""

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, Self, cast

from pydantic import model_validator

from mergetool.bundle.manifest import HeadRule
from mergetool.methods.base import RANK, Field, Rank
from mergetool.methods.families.bundle import BundleMethod
from mergetool.methods.families.nearest import NearestRouter

if TYPE_CHECKING:
    from mergetool.bundle.manifest import Kind
    from mergetool.bundle.options import Options


class MasksMethod(BundleMethod):
    """A method that keeps a mask of one shared change for every expert."""

    apart: ClassVar = False
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

    @model_validator(mode="after")
    def _has_one_rank(self) -> Self:
        if self.router is not None and self.router.rank is not None:
            raise ValueError("only the router has directions here: write `rank`, and leave `router.rank` out")
        return self

    @property
    @abstractmethod
    def least(self) -> float:
        """How many times what others add to an entry an expert's own change of it must exceed."""

    def options(self) -> "Options":
        from mergetool.bundle.options import Options

        return Options(
            kind=cast("Kind", self.method_name()),
            rank=self.rank,
            filter="fusionbench",
            conv="mean",
            dtype=self.factors,
            size=None,
            base=self.base,
            router=None if self.router is None else self.router.options(),
            heads=self.heads,
            margin=self.least,
        )
