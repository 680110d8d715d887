"""Bundles around a merged model, whose experts are shared out among an input by the probability of its tasks."""

from typing import TYPE_CHECKING, ClassVar, Literal, Self, cast

from pydantic import model_validator

from mergetool.methods.base import Field, Finite
from mergetool.methods.families.bundle import RoutedMethod
from mergetool.methods.families.nearest import SharesRouter

if TYPE_CHECKING:
    from mergetool.bundle.manifest import Kind
    from mergetool.bundle.options import Options


class AroundMethod(RoutedMethod):
    """A method whose bundle has a merge of all experts as its base."""

    apart: ClassVar = False
    scale: Finite = Field(0.3, description="what the sum of all task vectors is multiplied by in the merged model")
    router: SharesRouter = Field(SharesRouter(), description="how probable the tasks are, and whose heads are asked")

    @model_validator(mode="after")
    def _holds_its_base(self) -> Self:
        if self.base == "reference":
            raise ValueError("`base: reference` cannot be: the base of this bundle is made for it. Leave it out")
        return self

    def around(self, own: tuple[str, ...] | Literal["all", "mlp"]) -> "Options":
        """`own`: what experts keep for themselves."""
        from dataclasses import replace

        router = replace(self.router.options(), per="sequence")
        kept = self.kept(cast("Kind", self.method_name()))
        return replace(kept, router=router, heads=self.heads, scale=self.scale, own=own)
